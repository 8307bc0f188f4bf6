"""Kill a real run again and again, and compare what it leaves with a run that was left alone.

`make crash` does it at the smallest honest scale on real weights: SIGKILL at
random moments, one SIGTERM whose delay is measured, then the same command until it ends.
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
from typing import Annotated

import tyro

from experiments.record.reader import read
from shl.utils.errors import ShlError

SCALE = """
  --rounds 1 --vector.contexts 8 --generate.max-new-tokens 24 --dose.rungs 2 --dose.probe-size 4
  --dose.min-train 8 --dose.batch-size 8 --heal.epochs 2 --eval.samples 4 --eval.bootstrap 50
""".split()  # noqa: SIM905
OWN = (".lock", "processes.jsonl")
"""What tells of processes, and so differs between runs that were cut at other places."""


@dataclass(frozen=True)
class CrashConfig:
    """How often and on what."""

    model: str = "gemma-3-270m"
    """As in experiments.run."""
    out: Path = Path("runs/crash")
    """Where the two run folders go; made anew."""
    kills: Annotated[int, tyro.conf.arg(help="SIGKILLs before the run is left alone")] = 8
    """SIGKILLs before the run is left alone [count]."""
    seed: int = 0
    """Of the moments."""


def differences(one: Path, other: Path) -> list[str]:
    """What two finished run folders do not share bit for bit, `seconds` apart.

    Raises:
        ShlError: a folder cannot be read as a run.
    """
    names = [
        {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        for folder in (one, other)
    ]
    found = [f"only in one: {name}" for name in sorted(names[0] ^ names[1]) if name not in OWN]
    found += [
        f"differs: {name}"
        for name in sorted(names[0] & names[1])
        if name not in (*OWN, "events.jsonl") and _timeless(one / name) != _timeless(other / name)
    ]
    events = [
        [{k: v for k, v in event.items() if k != "seconds"} for event in read(folder)[1]]
        for folder in (one, other)
    ]
    if events[0] != events[1]:
        at = next(
            (i for i, (a, b) in enumerate(zip(*events, strict=False)) if a != b), len(events[0])
        )
        found.append(f"differs: events.jsonl from line {at + 1}")
    return found


def _timeless(path: Path) -> bytes:
    """A file's bytes; of the page, those outside the section that tells of times and memory."""
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


def main() -> None:
    """The command line; status 1 if anything differs."""
    config = tyro.cli(CrashConfig, description=__doc__)
    shutil.rmtree(config.out, ignore_errors=True)
    alone, killed = config.out / "alone", config.out / "killed"
    begun = time.monotonic()
    _, error = (process := _start(config, alone)).communicate()
    if process.returncode:
        raise ShlError(f"the run that was left alone failed: {error.decode().strip()}")
    whole = time.monotonic() - begun
    print(f"left alone: {_done(alone)} events in {whole:.0f} s", flush=True)
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
            asked = time.monotonic()
            process.wait()
            name = "SIGTERM" if last else "SIGKILL"
            delay = f", ended {time.monotonic() - asked:.2f} s later" if last else ""
            print(f"{name} after {wait:.0f} s: {_done(killed)} events are there{delay}", flush=True)
    _, error = (process := _start(config, killed)).communicate()
    found = differences(alone, killed) if not process.returncode else [error.decode().strip()]
    print("\n".join(found) if found else "the two run folders are the same, seconds apart")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
