"""Run the arms and compare them: `python -m experiments.arms --axis care_auth`.

Every arm has its own run folder, kept when it is finished; the same command, run again, continues
where an earlier process ended.
"""

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from experiments.arms.catalogue import ARMS, Arm, chosen
from experiments.arms.doses import FILE as DOSES
from experiments.arms.doses import measure_doses
from experiments.arms.report import compare
from experiments.arms.stage_cache import StageCache
from experiments.arms.text_kl import FILE as TEXTS
from experiments.arms.text_kl import measure_texts
from experiments.record.command import command, say, wide_console
from experiments.record.journal import read_lines
from experiments.record.reader import RecordReader, is_finished, require_same_run
from experiments.record.settings import RunConfig, name_for, settings_of
from experiments.record.signals import Stop, Stopped
from experiments.report.report import report
from experiments.run import study
from shl.config import EvalConfig, LoopConfig
from shl.method.axes import load_axis
from shl.method.loop import StarvedError
from shl.models.load import load_model
from shl.utils.errors import require
from shl.utils.model import Model

Load = Callable[[], Model]


# Arms differ by less than a run does from base, so each stage is sampled twice as often.
LOOP = LoopConfig(eval=EvalConfig(samples=32))


@dataclass(frozen=True)
class ArmsConfig:
    """The method, prompting, and controls with the same seeds, prompts and budget."""

    axis: str = "care_auth"
    """Built-in axis or the path of a TOML file."""
    model: str = "gemma-3-270m"
    """Embedded model, hub name, or local folder."""
    arms: tuple[str, ...] = ("core",)
    """core, steps, far, all, or names of arms."""
    seeds: tuple[int, ...] = (42, 43, 44)
    """One run of every arm per seed."""
    out: Path | None = None
    """Folder of the arms; default runs/AXIS-MODEL-arms-DIGEST."""
    device: str | None = None
    """Device of the model, such as cpu or cuda; default CUDA if there is any, else the CPU."""
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")] = LOOP
    """The settings that all arms share."""


def run_arms(config: ArmsConfig, console: Console) -> Path:
    """Run the arms that are not finished, and compare all.

    Raises:
        ShlError: bad input, or a folder of another run.
        Stopped: a signal; every finished stage is kept.
    """
    require(
        config.loop.seed == LoopConfig().seed,
        f"seed is {config.loop.seed}; the arms take theirs from --seeds.",
    )
    require(len(config.seeds) > 0, "seeds is empty, name at least one.")
    arms = chosen(config.arms)
    shared = RunConfig(config.axis, config.model, device=config.device, loop=config.loop)
    axis = load_axis(config.axis)
    require(
        bool(axis.expected),
        f"axis {axis.name!r} expects no foundation to move, arms are compared by those that do.",
    )
    folder = config.out or Path("runs") / name_for(settings_of(shared, axis), "arms")

    @cache
    def load() -> Model:
        say(console, f"loading {config.model}")
        return load_model(config.model, device=config.device)

    for seed in config.seeds:
        seeded = replace(shared, loop=replace(config.loop, seed=seed))
        for arm in arms:
            say(console, f"{arm.name}, seed {seed}: {arm.question}")
            _arm(folder, seeded, arm, load, console)
        if "rmse" in {arm.name for arm in arms}:
            _measure_extras(folder, seeded, load, console)
        compare(folder, console)
    return folder


def _place(folder: Path, name: str, seed: int) -> Path:
    return folder / name / f"seed{seed}"


def _arm(folder: Path, shared: RunConfig, arm: Arm, load: Load, console: Console) -> None:
    out = _place(folder, arm.name, shared.loop.seed)
    config = replace(shared, out=out, loop=arm.change(shared.loop))
    lines = read_lines(out / "events.jsonl")
    if is_finished(out) or (lines and lines[-1]["event"] == "starved"):
        require_same_run(out, settings_of(config, load_axis(config.axis)))
        say(console, f"{out} is finished")
        return
    others = [_place(folder, name, shared.loop.seed) for name in ARMS if name != arm.name]
    begun = [path for path in others if read_lines(path / "events.jsonl")]
    try:
        study(config, console, load=load, shared=StageCache(begun, config.loop))
        report(out, Console(quiet=True))
    except StarvedError as error:
        say(console, f"{arm.name}, seed {shared.loop.seed} ends early: {error}")


def _measure_extras(folder: Path, shared: RunConfig, load: Load, console: Console) -> None:
    """Measure steering without training, and the per-token KL of the method's texts."""
    record = RecordReader(_place(folder, "rmse", shared.loop.seed))
    axis, loop = load_axis(shared.axis), ARMS["rmse"].change(shared.loop)
    if record.find("batch", 0) is None and record.find("steered", 0) is None:
        return
    with Stop() as stop:
        say(console, "steered without training, dose by dose")
        measure_doses(
            _place(folder, "steered", loop.seed) / DOSES, record, load(), axis, loop, stop
        )
        say(console, "per-token KL of prompted, kept and incoherent text")
        measure_texts(_place(folder, "steered", loop.seed) / TEXTS, record, load(), loop, stop)


def main() -> None:
    """The command line."""

    def run_and_compare(config: ArmsConfig) -> None:
        try:
            print(f"folder of the arms: {run_arms(config, wide_console())}")
        except Stopped:
            again = shlex.join([sys.executable, "-m", "experiments.arms", *sys.argv[1:]])
            print(f"to continue:\n{again}")
            raise

    command(run_and_compare, ArmsConfig, __doc__)


if __name__ == "__main__":
    main()
