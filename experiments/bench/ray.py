"""The core arms on Ray, two workers with a core each, against one study after the other."""

import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from experiments.arms.catalogue import GROUPS
from experiments.bench.measure import Row

SCALE = """
  --seeds 42 --rounds 1 --vector.contexts 16 --generate.max-new-tokens 32 --dose.rungs 2
  --dose.probe-size 4 --dose.min-train 8 --dose.batch-size 12 --heal.epochs 1 --eval.samples 4
  --eval.bootstrap 100
""".split()  # noqa: SIM905


def _seconds(out: Path, model: str, scale: list[str], *options: str) -> float:
    """Wall time of the program, its start included."""
    words = [*options, "--model", model, "--arms", "core", "--out", str(out), *scale]
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "experiments.arms", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return time.perf_counter() - started


def bench(model: str = "gemma-3-270m", scale: list[str] | None = None) -> list[Row]:
    """Each way once, at the scale of `make smoke`; then again on the finished folders, where what
    Ray takes is all that differs."""
    scale = SCALE if scale is None else scale
    one_core, ray = ("--num-cpus", "1"), ("--num-cpus", "1", "--ray", "local")
    with TemporaryDirectory() as scratch:
        turn, cluster = (Path(scratch) / name for name in ("turn", "ray"))
        in_turn = _seconds(turn, model, scale, *one_core)
        on_ray = _seconds(cluster, model, scale, *ray)
        nothing = _seconds(turn, model, scale, *one_core)
        started = _seconds(cluster, model, scale, *ray)
    studies, note = len(GROUPS["core"]), "once each, with start and comparison"
    own = (started - nothing) / studies
    return [
        Row(
            "in turn on 1 core / 2 workers", in_turn / on_ray, ">= 1.6", on_ray, in_turn, "s", note
        ),
        Row("Ray's own time per study", own, "<= 3 s", own, None, "s", f"of {studies} finished"),
    ]
