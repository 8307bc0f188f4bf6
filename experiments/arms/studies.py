"""The studies of the arms, an arm with a seed each: how one runs, and what it waits for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from experiments.arms.catalogue import ARMS
from experiments.arms.doses import FILE as DOSES
from experiments.arms.doses import measure_doses
from experiments.arms.stage_cache import StageCache, same_result
from experiments.arms.text_kl import FILE as TEXTS
from experiments.arms.text_kl import measure_texts
from experiments.record.command import say
from experiments.record.journal import read_lines
from experiments.record.reader import RecordReader, is_finished, require_same_run
from experiments.record.settings import RunConfig, settings_of
from experiments.record.signals import Stop
from experiments.report.report import report
from experiments.run import study
from shl.config import LoopConfig
from shl.method.axes import load_axis
from shl.method.loop import StarvedError
from shl.utils.model import Model

Load = Callable[[], Model]

SHARED = {"prompted-": -1, "vector": 0, "steered": 0}
"""The last stages, with their round, of what arms of a seed share: the baselines, the first vector,
and the first round's texts."""
STEERED = "steered"
"""Beside the arms: steering without training, and the per-token KL of the method's texts."""


@dataclass(frozen=True)
class Step:
    """A study of a seed, or its part up to the end of a stage.

    It can start when the steps in `after`, each an arm and where it ends, have ended.
    """

    arm: str
    until: str | None
    after: tuple[tuple[str, str | None], ...]


def steps(loops: Mapping[str, LoopConfig]) -> list[Step]:
    """The steps of the arms of a seed, each after those that it waits for.

    Of several arms with the same result of a stage the first computes it. An arm that others wait
    for is cut at the ends of these stages.

    Args:
        loops: settings by arm, in the order of the catalogue.
    """
    names, order = list(loops), list(SHARED)
    cuts: dict[str, set[str]] = {name: set() for name in names}
    found = []
    if "rmse" in cuts:
        cuts["rmse"].add("steered")
        found.append(Step(STEERED, None, (("rmse", "steered"),)))
    # From the last arm: where an arm is cut is known once all later ones are.
    for number, name in reversed(list(enumerate(names))):
        first = {
            stage: next(
                (o for o in names[:number] if same_result(stage, at, loops[name], loops[o])), None
            )
            for stage, at in SHARED.items()
        }
        own: list[Step] = []
        begin = 0
        for until in (*sorted(cuts[name], key=order.index), None):
            end = len(order) if until is None else order.index(until) + 1
            waits = {arm: stage for stage in order[begin:end] if (arm := first[stage])}
            for arm, stage in waits.items():
                cuts[arm].add(stage)
            before = [(name, own[-1].until)] if own else []
            own.append(Step(name, until, (*before, *waits.items())))
            begin = end
        found += reversed(own)
    return found[::-1]


def place(folder: Path, name: str, seed: int) -> Path:
    """The run folder of a study."""
    return folder / name / f"seed{seed}"


def ended(out: Path) -> bool:
    """Whether a study is finished or starved."""
    lines = read_lines(out / "events.jsonl")
    return is_finished(out) or (bool(lines) and lines[-1]["event"] == "starved")


def run_arm(
    folder: Path,
    shared: RunConfig,
    name: str,
    load: Load,
    console: Console,
    *,
    until: str | None = None,
    stop: Stop | None = None,
) -> None:
    """Run a study, or its part up to `until`; a starved one is no error.

    Raises:
        ShlError: bad input, or a folder of another run.
        Stopped: a signal; every finished stage is kept.
    """
    seed, arm = shared.loop.seed, ARMS[name]
    out = place(folder, name, seed)
    config = replace(shared, out=out, loop=arm.change(shared.loop))
    if ended(out):
        require_same_run(out, settings_of(config, load_axis(config.axis)))
        say(console, f"{out} is finished")
        return
    others = [place(folder, other, seed) for other in ARMS if other != name]
    begun = [path for path in others if read_lines(path / "events.jsonl")]
    try:
        study(
            config,
            console,
            load=load,
            shared=StageCache(begun, config.loop),
            until=until,
            stop=stop,
        )
        if until is None:
            report(out, Console(quiet=True))
    except StarvedError as error:
        say(console, f"{name}, seed {seed} ends early: {error}")


def run_steered(
    folder: Path, shared: RunConfig, load: Load, console: Console, stop: Stop | None = None
) -> None:
    """Measure steering without training, and the per-token KL of the method's texts.

    Raises as `run_arm`.
    """
    seed = shared.loop.seed
    record = RecordReader(place(folder, "rmse", seed))
    axis, loop = load_axis(shared.axis), ARMS["rmse"].change(shared.loop)
    if record.find("batch", 0) is None and record.find("steered", 0) is None:
        return
    out = place(folder, STEERED, seed)
    with stop or Stop() as stop:
        say(console, "steered without training, dose by dose")
        measure_doses(out / DOSES, record, load(), axis, loop, stop)
        say(console, "per-token KL of prompted, kept and incoherent text")
        measure_texts(out / TEXTS, record, load(), loop, stop)
