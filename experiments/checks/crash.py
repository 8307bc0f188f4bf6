"""Kill a run at random moments, resume it, and compare it with an uninterrupted run.

`make crash` does so on real weights at a small scale: several SIGKILLs and one SIGTERM whose delay
is measured, then the same command until it ends.
"""

import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from experiments.record.command import command
from experiments.record.reader import read
from experiments.record.writer import LOG
from shl.utils.errors import ShlError

SCALE = """
  --rounds 1 --vector.contexts 8 --generate.max-new-tokens 24 --dose.rungs 2 --dose.probe-size 4
  --dose.min-train 8 --dose.batch-size 8 --heal.epochs 2 --eval.samples 4 --eval.bootstrap 50
""".split()  # noqa: SIM905
PROCESS_FILES = (".lock", "processes.jsonl", LOG)
"""Files about the processes of a run, which differ between runs that ended at other places."""


@dataclass(frozen=True)
class CrashConfig:
    """How often a run is killed, and on which model."""

    model: str = "gemma-3-270m"
    """As in experiments.run."""
    out: Path = Path("runs/crash")
    """Folder of the two runs, deleted first."""
    kills: int = 8
    """Signals before the run may finish; the last one is SIGTERM [count]."""
    seed: int = 0
    """Seed of the random moments."""


def differences(one: Path, other: Path) -> list[str]:
    """The files in which two finished run folders differ, times and process files apart.

    Raises:
        ShlError: a folder cannot be read as a run.
    """
    ours, theirs = (
        {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        - set(PROCESS_FILES)
        for folder in (one, other)
    )
    found = [f"only in one: {name}" for name in sorted(ours ^ theirs)]
    found += [
        f"differs: {name}"
        for name in sorted((ours & theirs) - {"events.jsonl"})
        if _timeless(one / name) != _timeless(other / name)
    ]
    events = [
        [
            {k: v for k, v in event.items() if k not in ("seconds", "cpu")}
            for event in read(folder)[1]
        ]
        for folder in (one, other)
    ]
    if events[0] != events[1]:
        at = next(
            (i for i, (a, b) in enumerate(zip(*events, strict=False)) if a != b), len(events[0])
        )
        found.append(f"differs: events.jsonl from line {at + 1}")
    return found


def _timeless(path: Path) -> bytes:
    """A file's bytes; for the page, without the section about time and memory."""
    found = path.read_bytes()
    if path.name == "report.html":
        found = re.sub(rb'<section id="cost">.*?</section>', b"", found, flags=re.DOTALL)
    return found


def _start(config: CrashConfig, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "experiments.run", "--model", config.model, *SCALE]
    return subprocess.Popen(
        [*command, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def _done(folder: Path) -> int:
    return len(read(folder)[1]) if (folder / "events.jsonl").exists() else 0


def crash(config: CrashConfig) -> None:
    """Run, kill, resume and compare; exits with status 1 if anything differs."""
    shutil.rmtree(config.out, ignore_errors=True)
    alone, killed = config.out / "alone", config.out / "killed"
    begun = time.monotonic()
    _, error = (process := _start(config, alone)).communicate()
    if process.returncode:
        raise ShlError(f"the uninterrupted run failed: {error.decode().strip()}")
    whole = time.monotonic() - begun
    print(f"uninterrupted: {_done(alone)} events in {whole:.0f} s", flush=True)
    rng = random.Random(config.seed)
    for kill in range(config.kills):
        process = _start(config, killed)
        wait = rng.uniform(0.12, 0.3) * whole
        try:
            process.wait(wait)
            break
        except subprocess.TimeoutExpired:
            last = kill == config.kills - 1
            process.send_signal(signal.SIGTERM if last else signal.SIGKILL)
            sent = time.monotonic()
            process.wait()
            name = "SIGTERM" if last else "SIGKILL"
            delay = f", ended {time.monotonic() - sent:.2f} s later" if last else ""
            print(f"{name} after {wait:.0f} s: {_done(killed)} events{delay}", flush=True)
    _, error = (process := _start(config, killed)).communicate()
    found = differences(alone, killed) if not process.returncode else [error.decode().strip()]
    print("\n".join(found) if found else "the two run folders are identical, times apart")
    sys.exit(bool(found))


def main() -> None:
    """The command line."""
    command(crash, CrashConfig, __doc__)


if __name__ == "__main__":
    main()
