"""Interleaved timing on a shared machine: repeats in turns, medians, spread."""

import ctypes
import gc
import os
import platform
import re
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

PEERS = ("torch", "transformers", "transformer-lens", "peft", "liger-kernel", "triton")


@dataclass(frozen=True)
class Timing:
    """Wall and process CPU seconds of each repeat of a case, and the peak of its extra memory."""

    wall: tuple[float, ...]
    cpu: tuple[float, ...]
    peak_mb: float

    @property
    def seconds(self) -> float:
        """Median wall time."""
        return statistics.median(self.wall)

    @property
    def spread(self) -> float:
        """Largest over smallest wall time."""
        return max(self.wall) / min(self.wall)

    @property
    def least_cpu(self) -> float:
        """The least CPU time, the figure that neighbours disturb least."""
        return min(self.cpu)


def timing(repeats: Sequence[tuple[float, float, float]]) -> Timing:
    """The timing of a case from the wall seconds, CPU seconds and peak MB of its repeats."""
    walls, cpus, peaks = zip(*repeats, strict=True)
    return Timing(walls, cpus, max(0.0, *peaks))


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _reset_peak() -> float:
    """Reset the peak of the process's memory and return its present size, MB."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    # Memory that the allocator keeps from earlier cases would hide what this one needs.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return _status("VmHWM")


def _status(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise KeyError(key)


Around = Callable[[], AbstractContextManager[Any]]


def interleave(
    cases: Mapping[str, Callable[[], Any]],
    repeats: int = 3,
    around: Mapping[str, Around] | None = None,
    *,
    warm: bool = True,
) -> dict[str, Timing]:
    """Run each case once unmeasured (if `warm`), then all of them in turn, `repeats` times.

    The context manager from `around` is entered before the clock starts and left after it stops.
    """
    around = dict.fromkeys(cases, nullcontext) | dict(around or {})
    for name, run in cases.items() if warm else ():
        with around[name]():
            run()
    measured: dict[str, list[tuple[float, float, float]]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, run in cases.items():
            with around[name]():
                gc.collect()
                _synchronise()
                held = _reset_peak()
                wall, cpu = time.perf_counter(), time.process_time()
                result = run()
                _synchronise()
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                measured[name].append((wall, cpu, _peak() - held))
                del result
    return {name: timing(repeats) for name, repeats in measured.items()}


def machine() -> dict[str, Any]:
    """The machine and the versions of the packages."""
    cpu = re.search(r"^model name\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    installed = {found.metadata["Name"]: found.version for found in distributions()}
    return {
        "cpu": cpu[1].strip() if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16_instructions": torch.cpu._is_avx512_bf16_supported(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "load": os.getloadavg()[0],
        "versions": {name: installed.get(name, "not installed") for name in PEERS},
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


@dataclass(frozen=True)
class Row:
    """One line of a bench: a ratio with its target, and the two figures that it compares."""

    what: str
    ratio: float | None
    target: str
    ours: float | None = None
    theirs: float | None = None
    unit: str = "s"
    note: str = ""

    def cells(self) -> tuple[str, ...]:
        """What, ratio, target, ours, theirs, note."""
        ratio = "not measured" if self.ratio is None else f"{self.ratio:.3g}"
        ours, theirs = (
            "" if x is None else f"{x:.3g} {self.unit}" for x in (self.ours, self.theirs)
        )
        return self.what, ratio, self.target, ours, theirs, self.note


def speedup(what: str, target: str, ours: Timing, theirs: Timing, note: str = "") -> Row:
    """Their median wall time over ours; the default note is the spread."""
    a, b = ours.seconds, theirs.seconds
    return Row(what, b / a, target, a, b, "s", note or spread_note(ours, theirs))


def cpu_speedup(what: str, target: str, ours: Timing, theirs: Timing, note: str = "") -> Row:
    """Their least CPU time over ours."""
    a, b = ours.least_cpu, theirs.least_cpu
    return Row(what, b / a, target, a, b, "CPU s", note)


def extra_memory(what: str, target: str, ours: Timing, theirs: Timing) -> Row:
    """Our peak of extra memory over theirs."""
    a, b = ours.peak_mb, theirs.peak_mb
    return Row(what, a / b, target, a, b, "MB")


def spread_note(*timings: Timing) -> str:
    """The largest spread among timings, as a note."""
    return f"spread {max(t.spread for t in timings):.2f}"
