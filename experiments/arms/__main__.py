"""Run the arms and compare them: `python -m experiments.arms --axis care_auth`.

Every arm has its own run folder, kept when it is finished; the same command, run again, continues
where an earlier process ended.
"""

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console

from experiments.arms.catalogue import Arm, chosen
from experiments.arms.cluster import connected, folder_names, run_on_ray
from experiments.arms.report import compare
from experiments.arms.studies import run_arm, run_steered
from experiments.record.command import command, say, wide_console
from experiments.record.journal import lock, write_error
from experiments.record.settings import Dtype, Engine, RunConfig, name_for, settings_of
from experiments.record.signals import Stopped
from experiments.run import load_for
from shl.config import EvalConfig, LoopConfig
from shl.method.axes import load_axis
from shl.utils.errors import ShlError, require
from shl.utils.model import Model


def shared_settings() -> LoopConfig:
    """The defaults of a study, with as many answers of the prompted personas as of all others: the
    arms compare their survival."""
    return LoopConfig(eval=EvalConfig(persona_samples=EvalConfig().samples))


@dataclass(frozen=True)
class ArmsConfig:
    """The method, prompting, and controls with the same seeds, prompts and budget."""

    axis: tuple[str, ...] = ("care_auth",)
    """Built-in axes or paths of TOML files."""
    model: tuple[str, ...] = ("gemma-3-270m",)
    """Embedded models, hub names, or local folders."""
    arms: tuple[str, ...] = ("core",)
    """core, steps, far, on-policy, all, or names of arms."""
    seeds: tuple[int, ...] = (42, 43, 44)
    """One run of every arm per seed."""
    out: Path | None = None
    """Folder of the arms, or with several models or axes of their folders; default
    runs/AXIS-MODEL-arms-DIGEST for each of them."""
    device: str | None = None
    """Device of the model, such as cpu or cuda; default CUDA if there is any, else the CPU."""
    engine: Engine = "auto"
    """TransformerLens's HookedTransformer or TransformerBridge; auto is the first if installed."""
    dtype: Dtype | None = None
    """Dtype of the weights; default float32 on a CPU, bfloat16 on CUDA."""
    device_map: str | None = None
    """Devices by module for the engine bridge, as in transformers, such as auto."""
    ray: str | None = None
    """Run on Ray: local starts it on this machine, auto joins the cluster of this machine,
    ray://HOST:PORT another one; default one study after the other in this process."""
    num_cpus: int | None = None
    """Cores of a study, which are its torch threads: results are bit-identical only with the same
    number; default 1 on Ray, else as many as torch takes [count]."""
    num_gpus: float = 0.0
    """GPUs of a study on Ray [count]."""
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")] = field(default_factory=shared_settings)
    """The settings that all arms share."""


def run_arms(config: ArmsConfig, console: Console) -> list[Path]:
    """Run the arms that are not finished, compare all, and return a folder per model and axis.

    Raises:
        ShlError: bad input, a folder of another run or one in use, or on Ray, after all others have
            ended, a study that failed.
        Stopped: a signal; every finished stage is kept.
    """
    require(
        config.loop.seed == LoopConfig().seed,
        f"seed is {config.loop.seed}; the arms take theirs from --seeds.",
    )
    for name in ("axis", "model", "seeds"):
        require(bool(getattr(config, name)), f"{name} is empty, name at least one.")
    cores = config.num_cpus
    require(cores is None or cores > 0, f"num_cpus is {cores}, it must be at least 1.")
    require(config.num_gpus >= 0, f"num_gpus is {config.num_gpus:g}, it must be at least 0.")
    require(
        config.ray is not None or config.num_gpus == 0,
        f"num_gpus is {config.num_gpus:g}, it needs --ray.",
    )
    arms = chosen(config.arms)
    for axis in map(load_axis, config.axis):
        require(
            bool(axis.expected),
            f"axis {axis.name!r} expects no foundation to move, arms are compared by those that "
            "do.",
        )
    groups = [
        RunConfig(
            axis,
            model,
            device=config.device,
            engine=config.engine,
            dtype=config.dtype,
            device_map=config.device_map,
            loop=config.loop,
        )
        for model, axis in product(config.model, config.axis)
    ]
    if config.ray is not None:
        return _on_ray(config, groups, arms, console)
    if cores is not None:
        torch.set_num_threads(cores)
    names = [name_for(settings_of(shared, load_axis(shared.axis)), "arms") for shared in groups]
    with _folders(config, groups, names) as folders:
        for folder, seeded in folders.items():
            _in_turn(folder, seeded, arms, console)
    return list(folders)


@contextmanager
def _folders(
    config: ArmsConfig, groups: Sequence[RunConfig], names: Sequence[str]
) -> Iterator[Mapping[Path, Sequence[RunConfig]]]:
    """The settings of each seed by folder of arms; the folders are locked."""
    top = Path("runs") if config.out is None else config.out
    alone = config.out is not None and len(groups) == 1
    found = {}
    with ExitStack() as locks:
        for shared, name in zip(groups, names, strict=True):
            folder = top if alone else top / name
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise write_error(folder, error) from error
            locks.callback(lock(folder).release)
            loops = [replace(config.loop, seed=seed) for seed in config.seeds]
            found[folder] = [replace(shared, loop=loop) for loop in loops]
        yield found


def _in_turn(
    folder: Path, seeded: Sequence[RunConfig], arms: Sequence[Arm], console: Console
) -> None:
    """One study after the other."""

    @cache
    def load() -> Model:
        say(console, f"loading {seeded[0].model}")
        return load_for(seeded[0])

    for shared in seeded:
        for arm in arms:
            say(console, f"{arm.name}, seed {shared.loop.seed}: {arm.question}")
            run_arm(folder, shared, arm.name, load, console)
        if "rmse" in {arm.name for arm in arms}:
            run_steered(folder, shared, load, console)
        compare(folder, console)


def _on_ray(
    config: ArmsConfig, groups: Sequence[RunConfig], arms: Sequence[Arm], console: Console
) -> list[Path]:
    assert config.ray is not None
    threads = config.num_cpus or 1
    with connected(config.ray):
        names = folder_names(groups, threads, config.num_gpus)
        with _folders(config, groups, names) as folders:
            failed = run_on_ray(folders, arms, threads, config.num_gpus, console)
            for folder in folders:
                compare(folder, console, failed[folder])
    all_failed = [
        f"{name}: {why}" for by_study in failed.values() for name, why in by_study.items()
    ]
    if all_failed:
        raise ShlError(
            f"{len(all_failed)} studies failed, the same command tries them again; the first is "
            f"{all_failed[0]}"
        )
    return list(folders)


def main() -> None:
    """The command line."""

    def run_and_compare(config: ArmsConfig) -> None:
        try:
            for folder in run_arms(config, wide_console()):
                print(f"folder of the arms: {folder}")
        except Stopped:
            again = shlex.join([sys.executable, "-m", "experiments.arms", *sys.argv[1:]])
            print(f"to continue:\n{again}")
            raise

    command(run_and_compare, ArmsConfig, __doc__)


if __name__ == "__main__":
    main()
