"""Print what a run has finished and what remains: `python -m experiments.record.status [RUN]`."""

import os
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from experiments.record.command import command
from experiments.record.journal import Journal, is_locked
from experiments.record.progress import BASELINES, ROUND
from experiments.record.reader import Event, read
from experiments.record.schema import name_of
from shl.method.heal import Training
from shl.utils.errors import require


def peak_bytes() -> dict[str, int]:
    """Peak memory of this process so far: resident, and on the GPU."""
    peak = {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_available():
        peak["gpu"] = torch.cuda.max_memory_allocated()
    return peak


class Usage:
    """Two lines of processes.jsonl: when this process began, and how it ended.

    A process that was killed leaves only the first.
    """

    def __init__(self, folder: Path, events: int) -> None:
        self._journal = Journal(folder / "processes.jsonl")
        self._write({"process": os.getpid(), "event": "begin", "events": events})
        self.peak: dict[str, int] = {}

    def _write(self, line: dict[str, Any]) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._journal.append([{"time": now, **line}])

    def close(self, ended: str) -> None:
        """Write how the process ended: end, starved, error, or the signal's name."""
        self.peak = peak_bytes()
        self._write({"process": os.getpid(), "event": ended, "peak_bytes": self.peak})

    def sentence(self) -> str:
        """Peak memory in gigabytes."""
        parts = [f"{value / 1e9:.2f} GB {name}" for name, value in self.peak.items()]
        return f"peak memory {', '.join(parts)}"


def status(folder: Path) -> str:
    """Settings, finished stages, what remains, and whether a process is running it.

    Raises:
        ShlError: the folder is no run folder, or was modified.
    """
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
    locked = is_locked(folder)
    if locked is None:
        lines.append(f"process    unknown, no permission to open {folder / '.lock'}")
    elif locked:
        lines.append("process    running")
    else:
        again = "" if name in ("end", "starved") else "; the same command continues the run"
        lines.append(f"process    none{again}")
    return "\n".join(lines)


def _finished(events: Sequence[Event]) -> str:
    rounds: dict[int, list[str]] = {}
    for event in events:
        rounds.setdefault(event["round"], []).append(name_of(dict(event)))
    parts = []
    for index, names in rounds.items():
        if index >= 0 and "round" in names:
            parts.append(f"round {index}")
        else:
            where = f"round {index}: " if index >= 0 else ""
            stages = [n for n in names if n not in ("start", "end") and "validity:" not in n]
            parts += [where + ", ".join(stages)] if stages else []
    return "; ".join(parts) or "nothing"


def remaining(last: str, index: int, rounds: int) -> str:
    """What a run still has to do after its last event, given by name and round.

    Example:
        >>> remaining("probe", 0, 2)
        'round 0: batch, steered, healing, healed; 1 more round'
    """
    name = last.rsplit(":", 1)[-1]  # a reading counts as its stage
    order = BASELINES if index < 0 else ROUND
    begin = order.index(name) + 1 if name in order else 0 if name == "start" else len(order)
    where = f"round {index}: " if index >= 0 else ""
    parts = [where + ", ".join(order[begin:])] if begin < len(order) else []
    more = rounds - index - 1
    if more:
        kind = "more round" if index >= 0 else "round"
        parts.append(f"{more} {kind}{'s' if more > 1 else ''}")
    return "; ".join(parts) or "the final summary"


def newest(runs: Path = Path("runs")) -> Path:
    """The run folder that was written to last.

    Raises:
        ShlError: there is none.
    """
    found = [path.parent for path in runs.glob("*/events.jsonl")]
    require(bool(found), f"there is no run folder in {runs.resolve()}.")
    return max(found, key=lambda folder: (folder / "events.jsonl").stat().st_mtime)


@dataclass(frozen=True)
class RunFolder:
    """A finished or unfinished run."""

    run: tyro.conf.Positional[Path | None] = None
    """Its folder; default the newest in runs/."""

    @property
    def folder(self) -> Path:
        """The folder that is meant."""
        return self.run or newest()


def main() -> None:
    """The command line."""
    command(lambda config: print(status(config.folder)), RunFolder, __doc__)


if __name__ == "__main__":
    main()
