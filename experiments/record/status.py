"""What a run has done and what remains: `python -m experiments.record.status [RUN]`."""

import os
import resource
import sys
import time
from pathlib import Path

import torch

from experiments.record.journal import Journal, held
from experiments.record.reader import read
from experiments.record.schema import name_of
from shl.method.heal import Training
from shl.utils.errors import ShlError, require


def peak_bytes() -> dict[str, int]:
    """The most memory that this process has held so far: resident, and on the GPU."""
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

    def _write(self, line: dict[str, object]) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._journal.append([{"time": now, **line}])

    def close(self, ended: str) -> None:
        """Say how the process ended (end, starved, error, or the signal's name)."""
        self.peak = peak_bytes()
        self._write({"process": os.getpid(), "event": ended, "peak_bytes": self.peak})

    def sentence(self) -> str:
        """Peak memory in gigabytes."""
        parts = [f"{value / 1e9:.2f} GB {name}" for name, value in self.peak.items()]
        return f"peak memory {', '.join(parts)}"


def status(folder: Path) -> str:
    """A few lines: settings, progress, what remains, and whether a process is at work.

    Raises:
        ShlError: the folder is no run folder, or has been changed.
    """
    config, events, texts = read(folder)
    rounds = config["loop"]["rounds"]
    last = events[-1]
    lines = [
        f"{folder}: {config['model']}, axis {config['axis']}, {rounds} rounds, seed "
        f"{config['loop']['seed']}",
        f"done     {_done(events)}",
    ]
    state = folder / "rounds" / str(last["round"]) / "training.safetensors"
    if name_of(last) == "steered" and state.is_file():
        lines.append(f"         healing is saved after {len(Training.load(state).steps)} steps")
    lines.append(f"         {len(texts)} texts, {last['seconds'] / 60:.1f} minutes of computing")
    if name_of(last) == "starved":
        lines.append(f"ended    {last['sentence']}")
    elif name_of(last) != "end":
        lines.append(f"remains  {remains(name_of(last), last['round'], rounds)}")
    at_work = "a process is at work on it" if held(folder) else "no process is at work on it"
    finished = name_of(last) in ("end", "starved")
    go_on = "" if finished or held(folder) else "; the command that began it continues it"
    lines.append(f"now      {at_work}{go_on}")
    return "\n".join(lines)


def _done(events: list[dict]) -> str:
    rounds: dict[int, list[str]] = {}
    for event in events:
        rounds.setdefault(event["round"], []).append(name_of(event))
    parts = []
    for index, names in rounds.items():
        if index >= 0 and "round" in names:
            parts.append(f"round {index}")
        else:
            where = f"round {index}: " if index >= 0 else ""
            parts.append(where + ", ".join(n for n in names if _counts(n)))
    return "; ".join(part for part in parts if part) or "nothing yet"


def _counts(name: str) -> bool:
    return name not in ("start", "end") and not name.startswith("validity:")


def remains(last: str, index: int, rounds: int) -> str:
    """What a run of so many rounds has before it after an event of a name and a round."""
    order = ["vector", "probe", "batch", "steered", "healing", "healed"]
    first = ["base", "prompted+", "prompted-"]
    if index < 0:
        last = last.rsplit(":", 1)[-1]  # a reading counts as its stage
        begun = first.index(last) + 1 if last in first else 0 if last == "start" else len(first)
        left = first[begun:]
        return "; ".join([*([", ".join(left)] if left else []), f"{rounds} rounds"])
    last = last.rsplit(":", 1)[-1]
    here = order[order.index(last) + 1 :] if last in order else []
    whole = rounds - index - 1
    parts = [f"round {index}: {', '.join(here)}"] if here else []
    return "; ".join([*parts, *([f"{whole} more rounds"] if whole else [])]) or "the last line"


def newest(runs: Path = Path("runs")) -> Path:
    """The run folder that was written to last.

    Raises:
        ShlError: there is none.
    """
    found = [path.parent for path in runs.glob("*/events.jsonl")]
    require(bool(found), f"there is no run folder in {runs.resolve()}.")
    return max(found, key=lambda folder: (folder / "events.jsonl").stat().st_mtime)


def main() -> None:
    """The command line."""
    try:
        print(status(Path(sys.argv[1]) if len(sys.argv) > 1 else newest()))
    except ShlError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
