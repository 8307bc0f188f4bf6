"""Print what a run has finished and what remains: `python -m experiments.record.status [RUN]`."""

import os
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from experiments.record.command import command
from experiments.record.journal import Journal, is_locked
from experiments.record.progress import BASELINES, ROUND, label
from experiments.record.reader import Event, read
from experiments.record.schema import name_of
from experiments.record.signals import Stopped
from shl.method.heal import Training
from shl.method.loop import StarvedError
from shl.utils.errors import require


@contextmanager
def usage(folder: Path, events: int) -> Iterator[dict[str, int]]:
    """Write when this process began, and how the block ended (end, starved, error or the signal's
    name), to processes.jsonl; a killed process leaves only the first line.

    Yields the peak memory in bytes, resident and on the GPU, which is filled in after the block.
    """
    journal = Journal(folder / "processes.jsonl")
    peak: dict[str, int] = {}

    def write(event: str, **more: Any) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        journal.append([{"time": now, "process": os.getpid(), "event": event, **more}])

    write("begin", events=events)
    ended = "error"
    try:
        yield peak
        ended = "end"
    except StarvedError:
        ended = "starved"
        raise
    except Stopped as stopped:
        ended = str(stopped)
        raise
    finally:
        peak["resident"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if torch.cuda.is_available():
            peak["gpu"] = torch.cuda.max_memory_allocated()
        write(ended, peak_bytes=peak)


def status(folder: Path) -> str:
    """Settings, finished stages, what remains, and whether a process is running it."""
    config, events, texts = read(folder)
    rounds, seed = config["loop"]["rounds"], config["loop"]["seed"]
    last, name = events[-1], name_of(events[-1])
    lines = [
        f"{folder}: {config['model']}, axis {config['axis']}, {rounds} rounds, seed {seed}",
        f"finished   {_finished(events)}",
    ]
    state = folder / "rounds" / str(last["round"]) / "training.safetensors"
    if name.rsplit(":", 1)[-1] == "steered" and state.is_file():
        lines.append(f"           healing is saved after {len(Training.load(state).steps)} steps")
    lines.append(f"           {len(texts)} texts, {last['seconds'] / 60:.1f} minutes of computing")
    if name == "starved":
        lines.append(f"ended      {last['sentence']}")
    elif name != "end":
        lines.append(f"remains    {remaining(name, last['round'], rounds)}")
    again = "" if name in ("end", "starved") else "; the same command continues the run"
    process = {
        None: f"unknown, no permission to open {folder / '.lock'}",
        True: "running",
        False: f"none{again}",
    }
    return "\n".join([*lines, f"process    {process[is_locked(folder)]}"])


def _finished(events: Sequence[Event]) -> str:
    rounds: dict[int, list[str]] = {}
    for event in events:
        rounds.setdefault(event["round"], []).append(name_of(event))
    parts = []
    for index, names in rounds.items():
        # Names with a colon are readings of a stage, and validity checks.
        stages = [n for n in names if n not in ("start", "end") and ":" not in n]
        if index >= 0 and "round" in names:
            parts.append(f"round {index}")
        elif stages:
            parts.append(label(index) + ", ".join(stages))
    return "; ".join(parts) or "nothing"


def remaining(last: str, index: int, rounds: int) -> str:
    """What a run still has to do after its last event, given by name and round.

    Example:
        >>> remaining("probe", 0, 2)
        'round 0: batch, steered, healing, healed, retention; 1 more round'
    """
    name = last.rsplit(":", 1)[-1]  # a reading counts as its stage
    order = BASELINES if index < 0 else ROUND
    begin = order.index(name) + 1 if name in order else 0 if name == "start" else len(order)
    parts = [label(index) + ", ".join(order[begin:])] if begin < len(order) else []
    if more := rounds - index - 1:
        which = f"{more} more" if index >= 0 else f"{more}"
        parts.append(f"{which} round{'s' if more > 1 else ''}")
    return "; ".join(parts) or "the final summary"


@dataclass(frozen=True)
class RunFolder:
    """A finished or unfinished run."""

    run: tyro.conf.Positional[Path | None] = None
    """Its folder; default the newest in runs/."""

    @property
    def folder(self) -> Path:
        """The given folder, or the one in runs/ that was written to last."""
        if self.run:
            return self.run
        found = list(Path("runs").glob("*/events.jsonl"))
        require(bool(found), f"there is no run folder in {Path('runs').resolve()}.")
        return max(found, key=lambda path: path.stat().st_mtime).parent


def main() -> None:
    """The command line."""
    command(lambda config: print(status(config.folder)), RunFolder, __doc__)


if __name__ == "__main__":
    main()
