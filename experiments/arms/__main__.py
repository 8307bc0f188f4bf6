"""Run the arms and compare them: `python -m experiments.arms --axis care_auth`.

Every arm is a run folder of its own, kept when it is finished; the same command, run again, goes
on where an earlier process ended.
"""

import logging
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from transformer_lens import HookedTransformer

from experiments.arms.catalogue import ARMS, Arm, chosen
from experiments.arms.doses import FILE as DOSES
from experiments.arms.doses import measure_doses
from experiments.arms.report import compare
from experiments.arms.stage_cache import Lender
from experiments.arms.text_kl import FILE as TEXTS
from experiments.arms.text_kl import measure_kinds
from experiments.record.journal import read_lines
from experiments.record.reader import Past, finished, same_run
from experiments.record.settings import RunConfig, name_for, settings_of
from experiments.record.signals import Stop, Stopped
from experiments.report.report import report
from experiments.run import study
from shl.config import EvalConfig, LoopConfig
from shl.method.axes import load_axis
from shl.method.loop import StarvedError
from shl.models.load import load_model
from shl.utils.errors import ShlError, require

Load = Callable[[], HookedTransformer]


def _loop() -> LoopConfig:
    # Arms differ by less than a run does from base, so each stage is sampled twice as often.
    return LoopConfig(eval=EvalConfig(samples=32))


@dataclass(frozen=True)
class ArmsConfig:
    """The method, what it must beat, and its controls: same seeds, prompts and budget."""

    axis: str = "care_auth"
    """Built-in axis or the path of your own TOML file."""
    model: str = "gemma-3-270m"
    """Embedded model, hub name, or local folder."""
    arms: tuple[str, ...] = ("core",)
    """core, all, or names of arms."""
    seeds: tuple[int, ...] = (42, 43, 44)
    """One run of every arm per seed."""
    out: Path | None = None
    """Folder of all of them; default runs/AXIS-MODEL-arms-DIGEST."""
    device: str | None = None
    """Where the model lives; default CUDA if there is any, else the CPU."""
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")] = field(default_factory=_loop)
    """The settings that all arms share."""


def run_arms(config: ArmsConfig, console: Console) -> Path:
    """Run what is not there yet, and compare what is.

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
    folder = config.out or Path("runs") / name_for(
        settings_of(shared, load_axis(config.axis)), "arms"
    )

    @cache
    def load() -> HookedTransformer:
        console.print(f"loading {config.model}")
        return load_model(config.model, device=config.device)

    for seed in config.seeds:
        seeded = replace(shared, loop=replace(config.loop, seed=seed))
        for arm in arms:
            console.print(f"[bold]{arm.name}, seed {seed}[/]: {arm.asks}")
            _arm(folder, seeded, arm, load, console)
        if "rmse" in {arm.name for arm in arms}:
            _beside(folder, seeded, load, console)
        compare(folder, console)
    return folder


def _place(folder: Path, name: str, seed: int) -> Path:
    return folder / name / f"seed{seed}"


def _arm(folder: Path, shared: RunConfig, arm: Arm, load: Load, console: Console) -> None:
    out = _place(folder, arm.name, shared.loop.seed)
    config = replace(shared, out=out, loop=arm.change(shared.loop))
    lines = read_lines(out / "events.jsonl")
    if finished(out) or (lines and lines[-1]["event"] == "starved"):
        same_run(out, settings_of(config, load_axis(config.axis)))
        console.print(f"{out} is finished")
        return
    others = [_place(folder, name, shared.loop.seed) for name in ARMS if name != arm.name]
    begun = [path for path in others if read_lines(path / "events.jsonl")]

    def lent(event: str, index: int, part: str) -> Mapping[str, Any] | None:
        return lender()(event, index, part)

    @cache
    def lender() -> Lender:
        return Lender(begun, load(), config.loop)

    try:
        study(config, console, load=load, lent=lent)
        report(out, Console(quiet=True))
    except StarvedError as error:
        console.print(f"{arm.name}, seed {shared.loop.seed} ends early: {error}", markup=False)


def _beside(folder: Path, shared: RunConfig, load: Load, console: Console) -> None:
    """What the first arm's vector and texts are measured for besides."""
    past = Past(_place(folder, "rmse", shared.loop.seed))
    axis, loop = load_axis(shared.axis), ARMS["rmse"].change(shared.loop)
    if past.find("batch", 0) is None and past.find("steered", 0) is None:
        return
    with Stop() as stop:
        console.print("steered without training, dose by dose")
        measure_doses(_place(folder, "steered", loop.seed) / DOSES, past, load(), axis, loop, stop)
        console.print("per-token KL of prompted, kept and incoherent text")
        measure_kinds(_place(folder, "steered", loop.seed) / TEXTS, past, load(), loop, stop)


def main() -> None:
    """The command line; bad input ends with one sentence and status 2, a signal with 128 and its
    number."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    config = tyro.cli(ArmsConfig, description=__doc__)
    console = Console(width=max(120, Console().width), soft_wrap=True)
    try:
        folder = run_arms(config, console)
    except ShlError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        again = shlex.join([sys.executable, "-m", "experiments.arms", *sys.argv[1:]])
        print(f"the same command goes on from here:\n{again}")
        sys.exit(128 + stopped.number)
    print(f"folder of the arms: {folder}")


if __name__ == "__main__":
    main()
