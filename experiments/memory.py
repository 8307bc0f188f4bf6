"""Peak memory of a process, and the log of the processes that worked on a run."""

import os
import resource
import time
from pathlib import Path

import torch

from experiments.journal import Journal


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
