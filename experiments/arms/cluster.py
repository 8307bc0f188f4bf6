"""The arms on Ray: a task per step of a study, on this machine or on a cluster.

Ray places the tasks, starts each when those that it waits for have ended, and starts one again
whose worker died. Tasks return a sentence at most: all results go through the run folders, on a
file system that all machines share. A worker has as many torch threads as a task has cores, so its
results are bit-identical to those of one process with that `--num-cpus`.
"""

import logging
import os
import platform
import signal
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from experiments.arms.catalogue import ARMS, Arm
from experiments.arms.studies import STEERED, Step, ended, place, run_arm, run_steered, steps
from experiments.record.command import say
from experiments.record.journal import is_locked, read_lines, write_error
from experiments.record.progress import durations
from experiments.record.schema import name_of
from experiments.record.settings import ROOT, RunConfig, name_for, settings_of
from experiments.record.signals import Stop, Stopped
from experiments.record.writer import LOG
from experiments.run import load_for
from shl.config import LoopConfig
from shl.measure.continuations import item_instruments
from shl.method.axes import load_axis
from shl.utils.errors import ShlError, require
from shl.utils.model import Model

RETRIES = 5
"""Times that a step is started again after its worker died [count]."""
RELEASE = 60.0
"""The longest that a new worker waits for the lock of one that is about to die [s]."""
BEGINS, ENDS = "begins", "ends"


@contextmanager
def connected(address: str, **more: Any) -> Iterator[None]:
    """Ray on this machine (local), or a connection to a cluster; nothing if there is one already.

    Args:
        more: further options of `ray.init`.

    Raises:
        ShlError: Ray is not installed, the address is malformed, or no cluster answers.
    """
    require(
        address in ("local", "auto") or address.startswith("ray://"),
        f"ray is {address!r}, it must be local, auto or ray://HOST:PORT.",
    )
    require(
        find_spec("ray") is not None,
        "ray is not installed, run `pip install 'shl[ray]'` or leave --ray out.",
    )
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if address == "local":
        # Ray then takes the loopback address for this node, and all its ports listen there only.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        # Ray's default of 15 leaves workers next to nothing of a core beside other work.
        os.environ.setdefault("RAY_worker_niceness", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, **more}
    if address == "local":
        # Nothing is handed over through the object store; this is the least that Ray accepts.
        options |= {"include_dashboard": False, "object_store_memory": 80 * 2**20}
    else:
        options["runtime_env"] = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    try:
        ray.init(address, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        hint = "; a cluster with a token needs RAY_AUTH_MODE=token" if "://" in address else ""
        raise ShlError(f"Ray at {address} does not answer ({reason}){hint}.") from error
    try:
        yield
    finally:
        ray.shutdown()


@dataclass(frozen=True)
class Place:
    """Where the steps of a seed run: the folder of the arms, their settings, and the driver's
    working directory, from which relative paths are read."""

    folder: Path
    shared: RunConfig
    threads: int
    directory: Path

    def out(self, arm: str) -> Path:
        """The folder of a study."""
        return place(self.folder, arm, self.shared.loop.seed)


@lru_cache(maxsize=1)
def _model(config: RunConfig) -> Model:
    """The model of this worker, which keeps it for its next task."""
    return load_for(config)


def _begin(threads: int, directory: Path) -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    _require_seen(directory)
    os.chdir(directory)
    torch.set_num_threads(threads)


def _require_seen(folder: Path) -> None:
    require(
        folder.is_dir(),
        f"{platform.node()} does not see {folder.absolute()}, it must be on a file system that all "
        "machines of the cluster share.",
    )


def folder_name(shared: RunConfig, threads: int, directory: Path) -> str:
    """The name of the folder of arms, from the device and the versions that a worker has."""
    _begin(threads, directory)
    return name_for(settings_of(shared, load_axis(shared.axis)), "arms")


def work(where: Place, arm: str, until: str | None, *waited: str) -> str:
    """Run a step in a worker, and return why it failed, or nothing.

    Args:
        waited: what the steps that this one waits for returned.
    """
    # Studies differ in their axis and settings; the model is that of any of them.
    load = partial(_model, replace(where.shared, axis="", loop=LoopConfig()))
    shared = where.shared
    # Ray's own handler of SIGTERM ends the worker, and the step is tried again.
    stop = Stop(at_once=False, signals=(signal.SIGINT,))
    try:
        _begin(where.threads, where.directory)
        _require_seen(where.folder)
        with _log(where.out(arm), until) as console:
            if arm == STEERED:
                run_steered(where.folder, shared, load, console, stop)
            else:
                _wait_for_lock(where.out(arm))
                run_arm(where.folder, shared, arm, load, console, until=until, stop=stop)
    except (ShlError, torch.OutOfMemoryError) as error:
        return str(error)
    except Stopped:
        return "stopped by a signal."
    return ""


@contextmanager
def _log(out: Path, until: str | None) -> Iterator[Console]:
    """The log of a study, which also gets what libraries print."""
    import ray

    try:
        out.mkdir(parents=True, exist_ok=True)
        log = (out / LOG).open("a", buffering=1, encoding="utf-8")
    except OSError as error:
        raise write_error(out / LOG, error) from error
    with log, redirect_stdout(log), redirect_stderr(log):
        console = Console(file=log, width=120, soft_wrap=True)
        gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        process = f"process {os.getpid()} on {platform.node()}"
        process += f" with GPU {', '.join(gpus)}" if gpus else ""
        try:
            say(console, f"{_now()} {process} {BEGINS}" + (f", until {until}" if until else ""))
            yield console
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            say(console, f"{_now()} {process} {ENDS}")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _wait_for_lock(out: Path) -> None:
    deadline = time.monotonic() + RELEASE
    while is_locked(out) and time.monotonic() < deadline:
        time.sleep(0.5)


@dataclass
class Study:
    """A study as its driver sees it."""

    where: Place
    arm: str
    refs: list[Any] = field(default_factory=list)
    failed: str = ""

    def __post_init__(self) -> None:
        self.label = f"{self.arm}, seed {self.where.shared.loop.seed}"
        self.log = self.where.out(self.arm) / LOG
        self.durations: dict[tuple[int, str], float] = {}
        if self.arm != STEERED:
            shared = self.where.shared
            loop, axis = ARMS[self.arm].change(shared.loop), load_axis(shared.axis)
            self.durations = durations(loop, item_instruments(axis.cloze, loop.eval.conflicts))
        self.seconds = sum(self.durations.values())
        self.written, self.began = self._size(), self.finished_seconds()

    def _size(self) -> int:
        return self.log.stat().st_size if self.log.exists() else 0

    def running(self) -> bool:
        """Whether a worker of this driver is at it, from the last line of the log."""
        if self._size() <= self.written:
            return False
        return not self.log.read_text("utf-8", "replace").rstrip().endswith(ENDS)

    def finished_seconds(self) -> float:
        """About how long the stages on record took, in the unit of `seconds`."""
        out = self.where.out(self.arm)
        if ended(out):
            return self.seconds
        done = {(e["round"], name_of(e)) for e in read_lines(out / "events.jsonl")}
        return sum(value for key, value in self.durations.items() if key in done)


class View:
    """How far the studies are: done, running, waiting, and the time left."""

    def __init__(self, studies: Sequence[Study]) -> None:
        self.studies, self.began = studies, time.monotonic()

    def line(self, pending: Sequence[Any]) -> str:
        """One line of text; `pending` are the tasks that have not ended."""
        left = [s for s in self.studies if any(ref in pending for ref in s.refs)]
        running = sum(study.running() for study in left)
        failed = sum(bool(s.failed) for s in self.studies if s not in left)
        elapsed = time.monotonic() - self.began
        finished = sum(s.finished_seconds() for s in self.studies)
        gained = finished - sum(s.began for s in self.studies)
        remaining = sum(s.seconds for s in self.studies) - finished
        text = f"{len(self.studies) - len(left)} studies done"
        text += f" ({failed} failed)" if failed else ""
        text += f", {running} running, {len(left) - running} waiting, {elapsed / 60:.1f} min"
        if gained > 0:
            text += f" elapsed, about {elapsed * remaining / gained / 60:.0f} min left"
        return text


def folder_names(configs: Sequence[RunConfig], threads: int, gpus: float) -> list[str]:
    """`folder_name` of each, from a worker; a driver need not have the workers' device."""
    import ray

    task = ray.remote(num_cpus=threads, num_gpus=gpus)(folder_name)
    try:
        return list(ray.get([task.remote(shared, threads, Path.cwd()) for shared in configs]))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ShlError):
            raise error.cause from None
        raise


def run_on_ray(
    folders: Mapping[Path, Sequence[RunConfig]],
    arms: Sequence[Arm],
    threads: int,
    gpus: float,
    console: Console,
) -> dict[Path, dict[str, str]]:
    """Run the arms of every seed, and return the sentences of the studies that failed, by folder
    and study. Ray is connected.

    Args:
        folders: by folder of arms, the settings of each seed.

    Raises:
        Stopped: a signal; each worker has finished the stage that it was in.
    """
    import ray

    # A worker with a GPU ends after its task, so that the GPU's memory is free for the next one.
    task = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=RETRIES)(work)
    studies: list[Study] = []
    for folder, configs in folders.items():
        for shared in configs:
            where = Place(folder, shared, threads, Path.cwd())
            found: dict[str, Study] = {}
            refs: dict[tuple[str, str | None], Any] = {}
            for step in steps({arm.name: arm.change(shared.loop) for arm in arms}):
                refs[step.arm, step.until] = ref = _submit(task, where, step, refs)
                found.setdefault(step.arm, Study(where, step.arm)).refs.append(ref)
            studies += found.values()
    _watch(studies, console)
    failed: dict[Path, dict[str, str]] = {folder: {} for folder in folders}
    for study in studies:
        if study.failed:
            failed[study.where.folder][study.label] = study.failed
    return failed


def _submit(task: Any, where: Place, step: Step, refs: Mapping[tuple[str, str | None], Any]) -> Any:
    name = f"{step.arm} seed{where.shared.loop.seed} {step.until or 'end'}"
    return task.options(name=name).remote(
        where, step.arm, step.until, *(refs[after] for after in step.after)
    )


def _watch(studies: Sequence[Study], console: Console) -> None:
    """Show progress until all tasks have ended; a signal stops the workers at their stage's end."""
    import ray

    of = {ref: study for study in studies for ref in study.refs}
    pending, view = list(of), View(studies)
    every = 2.0 if console.is_interactive else 60.0
    shown = -every
    with Stop(at_once=False) as stop, ExitStack() as stack:
        status = stack.enter_context(console.status("")) if console.is_interactive else None
        try:
            while pending:
                # Ray replaces an exception that a handler raises while it waits.
                with stop.delayed():
                    ready, pending = ray.wait(pending, num_returns=len(pending), timeout=1.0)
                for ref in ready:
                    _note(of[ref], ref, pending, console)
                if time.monotonic() - shown >= every:
                    shown = time.monotonic()
                    if status is not None:
                        status.update(view.line(pending))
                    else:
                        say(console, view.line(pending))
        except Stopped:
            say(console, "stopping: each worker finishes its stage; a second signal ends them now")
            for ref in pending:
                ray.cancel(ref, force=False)
            ray.wait(pending, num_returns=len(pending))
            raise
    say(console, view.line([]))


def _note(study: Study, ref: Any, pending: Sequence[Any], console: Console) -> None:
    """Take down how a task of a study ended."""
    import ray

    try:
        failed = ray.get(ref)
    except ray.exceptions.RayError as error:
        # A worker that died too often, or an error of the program, with its traceback in the log.
        cause = (str(getattr(error, "cause", None) or error).splitlines() or [""])[0]
        failed = f"{type(error).__name__}: {cause.rstrip('.')}."
    if failed and not study.failed:
        study.failed = failed
        say(console, f"{study.label} failed: {failed}")
    elif not failed and not any(ref in pending for ref in study.refs):
        say(console, f"{study.label} has ended")
