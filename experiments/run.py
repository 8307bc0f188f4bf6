"""Run the study: `python -m experiments.run --axis care_auth`.

The same command, run again, goes on where an earlier process ended.
"""

import dataclasses
import hashlib
import json
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from transformer_lens import HookedTransformer

from experiments.bar import Bar
from experiments.folder import FILES, TOLD, finished, read_json, same
from experiments.journal import read_lines
from experiments.memory import Usage
from experiments.recall import Recall
from experiments.record import Record, token_curves
from experiments.report import report
from experiments.stop import Stop, Stopped
from experiments.tinymfv import Tinymfv, TinymfvConfig, package, version_of
from experiments.validities import validities
from experiments.versions import versions
from shl.axes import Axis, load_axis
from shl.config import LoopConfig
from shl.errors import ShlError
from shl.fingerprint import weights_hash
from shl.loop import StarvedError, baselines, love
from shl.lora import Adapter
from shl.memory import fit
from shl.models import load_model
from shl.vector import SteeringVector


@dataclass(frozen=True)
class RunConfig:
    """Steer, filter, heal, repeat, and measure every round."""

    axis: str = "care_auth"
    """Built-in axis (care_auth, love) or the path of your own TOML file."""
    model: str = "gemma-3-270m"
    """Embedded model (gemma-3-270m, smollm2-135m-instruct), hub name, or local folder."""
    out: Path | None = None
    """Run folder: a new one, or the one that this run began in; default
    runs/AXIS-MODEL-seedSEED-DIGEST, the digest of settings, axis, code and packages."""
    device: str | None = None
    """Where the model lives; default CUDA if there is any, else the CPU."""
    max_memory: float | None = None
    """Batches are made small enough for this much memory, the GPU's or resident [GB]."""
    eval: Literal["vignettes", "tinymfv"] = "vignettes"
    """What reads each stage beside our own vignettes: tinymfv is the public package, installed
    with the extra of that name."""
    tinymfv: TinymfvConfig = field(default_factory=TinymfvConfig)
    """How much of tinymfv is asked."""
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")] = field(default_factory=LoopConfig)
    """The settings of every stage."""


Lent = Callable[[str, int, str], Mapping[str, Any] | None]
"""Called as `lent(event, round, part)`."""


def nothing_lent(event: str, index: int, part: str) -> None:
    """No other run lends its stages."""


def settings_of(config: RunConfig, axis: Axis) -> dict[str, dict[str, Any]]:
    """What is run, by file of the record."""
    asked = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    asked.pop("out")
    others: dict[str, str] = {}
    if config.eval == "vignettes":
        del asked["eval"], asked["tinymfv"]
    else:
        module = package()
        others = {module.__name__: version_of(module)}
    asked["device"] = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    told = {key: getattr(axis, key) for key in ("name", "description", "positive", "negative")}
    lists = {"contexts": axis.contexts, "prompts": axis.prompts, "expected": dict(axis.expected)}
    return {
        "config.json": asked,
        "axis.json": told | lists,
        "versions.json": versions(asked["device"], others),
    }


def folder_of(config: RunConfig, settings: Mapping[str, Mapping[str, Any]]) -> Path:
    """Where the run is kept: the same for the same run, another for any other."""
    if config.out is not None:
        return config.out
    return Path("runs") / name_for(settings, f"seed{config.loop.seed}")


def name_for(settings: Mapping[str, Mapping[str, Any]], what: str) -> str:
    """AXIS-MODEL-WHAT-DIGEST, the digest that of everything that is run."""
    told = {
        name: {key: value for key, value in values.items() if key not in TOLD}
        for name, values in settings.items()
    }
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]
    model = settings["config.json"]["model"].rstrip("/").split("/")[-1]
    # An axis file may call itself anything, a path included.
    names = "-".join(re.sub(r"[^\w.-]+", "_", x) for x in (settings["axis.json"]["name"], model))
    return f"{names}-{what}-{digest}"


def run(
    config: RunConfig,
    record: Record,
    model: HookedTransformer,
    axis: Axis,
    console: Console,
    stop: Stop,
    lent: Lent = nothing_lent,
) -> None:
    """Run what the record does not hold yet.

    Args:
        lent: asked, like `shl.love`'s recall, for a stage that the record lacks; what another run
            finished alike is written down here as if it had been computed.

    Raises:
        ShlError: bad input, too few survivors, or numbers that are not finite.
        Stopped: a signal; the record is complete up to the last stage.
    """
    loop = config.loop
    if config.max_memory is not None:
        loop = fit(model, axis, loop, config.max_memory * 1e9)
        console.print(f"for {config.max_memory:g} GB: {_batches(loop)}")
    instruments = {"tinymfv": Tinymfv(config.tinymfv)} if config.eval == "tinymfv" else {}
    bar = Bar(loop, console, len(instruments))
    known = Recall(record, model, loop)

    def observe(event: str, index: int, values: Mapping[str, Any]) -> None:
        with stop.held():
            record.observe(event, index, values)
        bar.observe(event, index, values)

    def recall(event: str, index: int, part: str) -> Mapping[str, Any] | None:
        values = known(event, index, part)
        if values is not None:
            bar.recalled(event, index, values)
            return values
        values = lent(event, index, part)
        if values is not None:
            observe(event, index, values)
        return values

    adapters: list[Adapter] = []
    first: SteeringVector | None = None
    with bar.progress:
        baselines(model, axis, loop, observe, recall, instruments=instruments)
        for found in validities(record.events, axis, loop.eval):
            if record.find(f"validity:{found.instrument}", -1) is None:
                with stop.held():
                    record.event("validity", -1, found.event())
        rounds = love(model, axis, loop, observe=observe, recall=recall, instruments=instruments)
        for done in rounds:
            first = first or done.vector
            with stop.held():
                if record.find("round", done.index) is None:
                    record.round(done, first)
            if record.find("token_kl", done.index) is None:
                curves = token_curves(model, done, adapters)
                with stop.held():
                    record.event("token_kl", done.index, {"curves": curves})
            adapters.append(done.adapter)
    with stop.held():
        record.event("end", loop.rounds - 1, {})


def _batches(loop: LoopConfig) -> str:
    sizes = {
        "generation": loop.generate.batch_size,
        "scoring": loop.filter.batch_size,
        "extraction": loop.vector.batch_size,
        "evaluation": loop.eval.batch_size,
        "training": loop.heal.rows,
    }
    return ", ".join(f"{name} by {size}" for name, size in sizes.items())


def study(
    config: RunConfig,
    console: Console,
    *,
    load: Callable[[], HookedTransformer] | None = None,
    lent: Lent = nothing_lent,
) -> Path:
    """Run the study, or what is left of it, and return its folder.

    Args:
        load: gives the model, by default `load_model`.
        lent: as `run`.

    Raises:
        ShlError: as `run`, and a folder that holds another run or is in use.
        Stopped: a signal.
    """
    axis = load_axis(config.axis)
    needed = config.loop.vector.contexts
    if needed > len(axis.contexts):
        raise ShlError(f"vector.contexts is {needed}, axis {axis.name!r} has {len(axis.contexts)}.")
    settings = settings_of(config, axis)
    folder = folder_of(config, settings)
    if finished(folder):
        for name in FILES:
            same(read_json(folder / name), json.loads(json.dumps(settings[name])), folder / name)
        console.print(f"{folder} is finished; name another with --out to run it again")
        return folder
    try:
        with Stop() as stop:
            model = _model(config, console, load)
            _continue(config, axis, model, folder, settings, console, stop, lent)
    except Stopped:
        again = shlex.join([sys.executable, "-m", "experiments.run", *sys.argv[1:]])
        events = read_lines(folder / "events.jsonl")
        console.print(
            f"stopped; {folder} is complete up to its {max(0, len(events) - 1)} finished stages; "
            f"the same command goes on from there:\n{again}"
        )
        raise
    return folder


def _model(
    config: RunConfig, console: Console, load: Callable[[], HookedTransformer] | None
) -> HookedTransformer:
    if load is not None:
        return load()
    console.print(f"loading {config.model} (the first start converts its weights in a minute)")
    return load_model(config.model, device=config.device)


def _continue(
    config: RunConfig,
    axis: Axis,
    model: HookedTransformer,
    folder: Path,
    settings: Mapping[str, Mapping[str, Any]],
    console: Console,
    stop: Stop,
    lent: Lent,
) -> None:
    record = Record(folder, settings, config.loop.eval, weights_hash(model))
    last = record.events[-1]["event"]
    if len(record.events) > 1:
        console.print(f"going on with {folder} after {len(record.events)} events")
    usage = Usage(folder, len(record.events))
    ended = "error"
    try:
        run(config, record, model, axis, console, stop, lent)
        ended = "end"
    except StarvedError as error:
        ended = "starved"
        if last != "starved":
            with stop.held():
                index = record.events[-1]["round"]
                record.event("starved", index, {"sentence": str(error)})
        report(folder, console)
        raise
    except Stopped as stopped:
        ended = str(stopped)
        raise
    finally:
        usage.close(ended)
        record.lock.release()
    console.print(usage.sentence())


def main() -> None:
    """The command line; bad input ends with one sentence and status 2, a signal with 128 and its
    number."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    config = tyro.cli(RunConfig, description=__doc__)
    console = Console(width=max(120, Console().width), soft_wrap=True)
    try:
        folder = study(config, console)
        report(folder, console)
    except ShlError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        sys.exit(128 + stopped.number)
    print(f"run folder: {folder}")


if __name__ == "__main__":
    main()
