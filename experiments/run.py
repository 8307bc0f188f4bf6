"""Run the study: `python -m experiments.run --axis care_auth`.

The same command, run again, continues where an earlier process ended.
"""

import shlex
import sys
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from experiments.questions.agreement import validities
from experiments.record.command import command, say, wide_console
from experiments.record.journal import read_lines
from experiments.record.progress import StageProgress
from experiments.record.reader import is_finished, require_same_run
from experiments.record.resume import Reached, Recorder, SharedStages
from experiments.record.settings import RunConfig, engine_options, folder_of, settings_of
from experiments.record.signals import Stop, Stopped
from experiments.record.status import usage
from experiments.record.writer import (
    Beside,
    RecordWriter,
    beside,
    require_usable,
    round_numbers,
    token_curves,
)
from experiments.report.report import report
from shl.config import FOUNDATIONS, LoopConfig
from shl.hooks.adapter import Adapter
from shl.hooks.fingerprint import weights_hash
from shl.hooks.sites import band
from shl.hooks.vector import SteeringVector
from shl.measure.continuations import Cloze, item_instruments, read_cloze
from shl.measure.evaluation import nats_of
from shl.measure.nulls import nulls
from shl.measure.tinymfv import Tinymfv
from shl.measure.vignettes import evaluate, first_vignettes, probe_data
from shl.method.axes import Axis, load_axis, nuisance_axes, require_instrument
from shl.method.loop import StarvedError, baselines, love, require_fits
from shl.method.online import require_paraphrases
from shl.models.load import load_model
from shl.models.nan_checks import named
from shl.utils.errors import require
from shl.utils.model import Model


def nothing_shared(name: str, index: int) -> tuple[()]:
    """No stage is copied from another run."""
    return ()


def run(
    config: RunConfig,
    record: RecordWriter,
    model: Model,
    axis: Axis,
    console: Console,
    shared: SharedStages,
    until: str | None = None,
) -> None:
    """Run every stage that is neither in the record nor in a `shared` run, or those up to `until`.

    Raises:
        ShlError: bad input, too few survivors, or numbers that are not finite.
        Stopped: a signal; the record is complete up to the last stage.
    """
    loop = config.loop
    instruments = item_instruments(axis.cloze, loop.eval.conflicts)
    if config.eval == "tinymfv":
        instruments["tinymfv"] = Tinymfv(config.tinymfv)
    progress = StageProgress(loop, console, instruments)
    recorder = Recorder(record, model, loop, progress, shared, until)
    adapters: list[Adapter] = []
    first: SteeringVector | None = None
    others: Beside | None = None
    try:
        with progress.bar:
            baselines(model, axis, loop, observer=recorder, instruments=instruments)
            for found in validities(record.events, axis, loop.eval):
                if record.find(f"validity:{found.instrument}", -1) is None:
                    record.event("validity", -1, found.event())
            names = (*FOUNDATIONS, "cloze") if axis.cloze else FOUNDATIONS
            absent = [name for name in names if recorder.recorded(f"nulls:{name}", -1) is None]
            if loop.eval.nulls and absent:
                for event in random_vectors(model, axis.cloze, loop):
                    if event["instrument"] in absent:
                        record.event("nulls", -1, event)
            for done in love(model, axis, loop, observer=recorder, instruments=instruments):
                first = first or done.vector
                if record.find("round", done.index) is None:
                    others = others or beside(model, axis, first.directions)
                    record.event("round", done.index, round_numbers(done, first, others))
                if record.find("token_kl", done.index) is None:
                    curves = token_curves(model, done, adapters)
                    record.event("token_kl", done.index, {"curves": curves})
                adapters.append(done.adapter)
    except Reached:
        return
    except StarvedError as error:
        last = record.events[-1]
        if last["event"] != "starved":
            record.event("starved", last["round"], {"sentence": str(error)})
        report(record.folder, console)
        raise
    record.event("end", loop.rounds - 1, {})


def random_vectors(
    model: Model, cloze: Cloze | None, loop: LoopConfig, folder: Path | None = None
) -> list[dict[str, Any]]:
    """Events with what random vectors at the run's layers do to each foundation of the vignettes,
    and to the cloze if there is one; `folder` as in `nulls`."""
    layers = loop.vector.layers or tuple(band(model, 1 / 3, 2 / 3))
    read = partial(nulls, model, layers, count=loop.eval.nulls, folder=folder)
    asked = (first_vignettes(loop.eval.vignettes), dict(probe_data()))
    with named("reading random vectors"):
        table = read(
            "vignettes", asked, lambda model: nats_of(evaluate(model, config=loop.eval).log_p)
        )
        found = {name: table.only(k) for k, name in enumerate(FOUNDATIONS)}
        if cloze is not None:
            found["cloze"] = read(
                "cloze", cloze, lambda model: float(read_cloze(model, cloze).mean())
            )
    return [
        {
            "instrument": name,
            "layers": sorted(layers),
            "levels": list(table.levels),
            "values": table.values.tolist(),
        }
        for name, table in found.items()
    ]


def load_for(config: RunConfig) -> Model:
    """The model of a run, on its device and engine."""
    options = engine_options(config)
    if "dtype" in options:
        options["dtype"] = getattr(torch, options["dtype"])
    return load_model(config.model, device=config.device, **options)


def study(
    config: RunConfig,
    console: Console,
    *,
    load: Callable[[], Model] | None = None,
    shared: SharedStages = nothing_shared,
    until: str | None = None,
    stop: Stop | None = None,
) -> Path:
    """Run the study, or the rest of it, and return its folder.

    `load` returns the model, by default with `load_model`; `until` names a stage of the baselines
    or of the first round, with which this call ends. Raises as `run`, and `ShlError` for a folder
    that holds another run or is in use.
    """
    axis, needed = load_axis(config.axis), config.loop.vector.contexts
    require_instrument(axis)
    nuisance_axes(axis, config.loop.vector.remove)
    require_paraphrases(axis, config.loop)
    require(
        needed <= len(axis.contexts),
        f"vector.contexts is {needed}, axis {axis.name!r} has {len(axis.contexts)}.",
    )
    settings = settings_of(config, axis)
    folder = folder_of(config, settings)
    if is_finished(folder):
        require_same_run(folder, settings)
        say(console, f"{folder} is finished; to run it again name another folder with --out")
        return folder
    require_usable(folder, settings)
    try:
        with stop or Stop() as stop:
            if load is None:
                say(console, f"loading {config.model} (the first time takes half a minute longer)")
            model = load() if load else load_for(config)
            require_fits(model, config.loop)
            with (
                closing(RecordWriter(folder, settings, weights_hash(model), stop)) as record,
                usage(folder, len(record.events)) as peak,
            ):
                if len(record.events) > 1:
                    say(console, f"continuing {folder} after {len(record.events)} events")
                run(config, record, model, axis, console, shared, until)
            memory = ", ".join(f"{value / 1e9:.2f} GB {where}" for where, value in peak.items())
            say(console, f"peak memory {memory}")
    except Stopped:
        again = shlex.join([sys.executable, "-m", "experiments.run", *sys.argv[1:]])
        stages = max(0, len(read_lines(folder / "events.jsonl")) - 1)
        say(console, f"stopped; {folder} holds {stages} finished events; to continue:\n{again}")
        raise
    return folder


def main() -> None:
    """The command line."""

    def run_and_report(config: RunConfig) -> None:
        console = wide_console()
        folder = study(config, console)
        report(folder, console)
        print(f"run folder: {folder}")

    command(run_and_report, RunConfig, __doc__)


if __name__ == "__main__":
    main()
