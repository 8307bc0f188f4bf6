"""Interleaved timing on a shared machine: repeats in turns, medians, spread."""

import ctypes
import gc
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PEERS = ("torch", "transformers", "transformer-lens", "peft", "liger-kernel", "triton")


@dataclass(frozen=True)
class Timing:
    """Wall and process CPU seconds of one case, and how much memory it needed at its peak."""

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


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _reset_peak() -> float:
    """Forget the process's peak memory and return what it holds now, MB."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    # What the allocator still holds of earlier cases would hide what this one needs.
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
    """Run each case once unmeasured (if `warm`), then all of them in turn, `repeats` times; what
    `around` makes is entered before the clock starts and left after it stops."""
    around = dict.fromkeys(cases, nullcontext) | dict(around or {})
    for name, run in cases.items() if warm else ():
        with around[name]():
            run()
    walls: dict[str, list[float]] = {name: [] for name in cases}
    cpus: dict[str, list[float]] = {name: [] for name in cases}
    peaks: dict[str, float] = dict.fromkeys(cases, 0.0)
    for _ in range(repeats):
        for name, run in cases.items():
            with around[name]():
                gc.collect()
                _synchronise()
                held = _reset_peak()
                wall, cpu = time.perf_counter(), time.process_time()
                result = run()
                _synchronise()
                walls[name].append(time.perf_counter() - wall)
                cpus[name].append(time.process_time() - cpu)
                peaks[name] = max(peaks[name], _peak() - held)
                del result
    return {n: Timing(tuple(walls[n]), tuple(cpus[n]), peaks[n]) for n in cases}


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    found = {}
    for name in PEERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16_instructions": torch.cpu._is_avx512_bf16_supported(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "load": os.getloadavg()[0],
        "versions": found,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


@dataclass(frozen=True)
class Row:
    """One line of a bench: a ratio with its target, and the times that it comes from."""

    what: str
    ratio: float | None
    target: str
    ours: float | None = None
    theirs: float | None = None
    unit: str = "s"
    note: str = ""

    def cells(self) -> tuple[str, ...]:
        """What, ratio, target, ours, theirs, note."""

        def number(x: float | None) -> str:
            return "not measured" if x is None else f"{x:.3g}"

        return (
            self.what,
            number(self.ratio),
            self.target,
            f"{number(self.ours)} {self.unit}" if self.ours is not None else "",
            f"{number(self.theirs)} {self.unit}" if self.theirs is not None else "",
            self.note,
        )

    def json(self) -> dict[str, Any]:
        """For the file."""
        return asdict(self)


def spread_note(*timings: Timing) -> str:
    """The largest spread among timings, as a note."""
    return f"spread {max(t.spread for t in timings):.2f}"
