"""Run the study: `python -m experiments.run --axis care_auth`.

The same command, run again, goes on where an earlier process ended.
"""

import logging
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from transformer_lens import HookedTransformer

from experiments.questions.agreement import validities
from experiments.record.journal import read_lines
from experiments.record.progress import Bar
from experiments.record.reader import finished, same_run
from experiments.record.resume import Recall
from experiments.record.settings import RunConfig, folder_of, settings_of
from experiments.record.signals import Stop, Stopped
from experiments.record.status import Usage
from experiments.record.writer import Record, token_curves
from experiments.report.report import report
from shl.hooks.adapter import Adapter
from shl.hooks.fingerprint import weights_hash
from shl.hooks.vector import SteeringVector
from shl.measure.tinymfv import Tinymfv
from shl.method.axes import Axis, load_axis
from shl.method.loop import StarvedError, baselines, love
from shl.models.load import load_model
from shl.utils.errors import ShlError

Lent = Callable[[str, int, str], Mapping[str, Any] | None]
"""Called as `lent(event, round, part)`."""


def nothing_lent(event: str, index: int, part: str) -> None:
    """No other run lends its stages."""


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
        same_run(folder, settings)
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
