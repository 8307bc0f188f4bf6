"""Arms at matched coherence, from their records alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from experiments.arms.catalogue import ARMS
from experiments.arms.doses import FILE as DOSES
from experiments.arms.doses import read_doses
from experiments.record.journal import Line, read_lines
from experiments.record.reader import RecordReader, axis_of
from experiments.record.resume import scores
from shl.config import FOUNDATIONS
from shl.measure.evaluation import nats_of
from shl.measure.stats import bootstrap
from shl.measure.vignettes import reading
from shl.method.axes import Axis

LEVELS = (0.97, 0.9, 0.75, 0.5)
"""Shares of base's coherence at which arms are compared: Q2's "a whisker", and three below it."""
# Two-sided 95 % points of Student's t for 1 to 9 degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Point:
    """One model on the plane of trait against coherence.

    `trait` is the mean shift of the axis's foundations from base in the expected direction, nats,
    with its interval over vignettes; `mass` and `survival` are shares of base's.
    """

    arm: str
    seed: int
    label: str
    trait: float
    interval: tuple[float, float]
    mass: float
    survival: float

    @property
    def coherence(self) -> float:
        """The worse of valid-answer mass and free-sample survival over base's, at most 1."""
        return min(1.0, self.mass, self.survival)


Found = Mapping[str, Mapping[int, Sequence[Point]]]
"""Points by arm and seed, each path in its order."""


def points(folder: Path) -> dict[str, dict[int, list[Point]]]:
    """By arm and seed: the healed student of each round, each dose of the steered one, and the
    prompted personas."""
    found: dict[str, dict[int, list[Point]]] = {}
    runs = [path for name in ARMS for path in sorted((folder / name).glob("seed*"))]
    for path in runs:
        name, seed = path.parent.name, int(path.name.removeprefix("seed"))
        if not read_lines(path / "events.jsonl"):
            continue
        past, axis = RecordReader(path), axis_of(path)
        if past.find("prompted-", -1) is None:
            continue
        found.setdefault(name, {})[seed] = _healed(past, axis, name, seed)
        if seed not in found.get("persona", {}):
            found.setdefault("persona", {})[seed] = _prompted(past, axis, seed)
    for path in sorted(folder.glob(f"steered/seed*/{DOSES}")):
        seed = int(path.parent.name.removeprefix("seed"))
        donor = next(folder / arm / f"seed{seed}" for arm in ARMS if seed in found.get(arm, {}))
        past = RecordReader(donor)
        base, axis = past.find("base", -1), axis_of(donor)
        assert base is not None
        found.setdefault("steered", {})[seed] = [
            _point("steered", seed, f"{line['dose']:.2f}", line, base, axis)
            for line in read_doses(path)
        ]
    order = ("persona", "steered", *ARMS)
    return {name: found[name] for name in order if name in found}


def _healed(past: RecordReader, axis: Axis, name: str, seed: int) -> list[Point]:
    base = past.find("base", -1)
    assert base is not None
    lines = [e for e in past.events if e["event"] == "stage" and e["stage"] == "healed"]
    return [_point(name, seed, str(e["round"]), e, base, axis) for e in lines]


def _prompted(past: RecordReader, axis: Axis, seed: int) -> list[Point]:
    """The persona against base ("raw"), and "half" of the way from its opposite: its wording raises
    the options that share words with it, whichever way it leans, and the contrast does not."""
    base, plus, minus = (past.find(name, -1) for name in ("base", "prompted+", "prompted-"))
    assert base is not None
    assert plus is not None
    assert minus is not None
    whole = _point("persona", seed, "raw", plus, base, axis)
    trait, interval = _shift(plus, minus, base, axis)
    half = (trait / 2, (interval[0] / 2, interval[1] / 2))
    return [
        whole,
        Point("persona", seed, "half", *half, whole.mass, whole.survival),
    ]


def _point(arm: str, seed: int, label: str, line: Line, base: Line, axis: Axis) -> Point:
    survival = line["survival"] / base["survival"] if base["survival"] else 0.0
    trait, interval = _shift(line, base, base, axis)
    return Point(arm, seed, label, trait, interval, line["coherence"], survival)


def _shift(one: Line, other: Line, base: Line, axis: Axis) -> tuple[float, tuple[float, float]]:
    """Mean on-axis shift of one stage against another, and its interval paired by vignette."""
    a, b = (reading(x["style"], scores(x), scores(base)) for x in (one, other))
    names = [FOUNDATIONS.index(name) for name in axis.expected]
    signs = np.array(list(axis.expected.values()))
    pairs = np.stack([a.log_p[:, names], b.log_p[:, names]], 1)

    def shift(x: np.ndarray) -> float:
        return float((signs * (nats_of(x[:, 0]) - nats_of(x[:, 1]))).mean())

    return shift(pairs), bootstrap(pairs, shift)


@dataclass(frozen=True)
class Spot:
    """Where an arm stands after a round or at a dose, over its seeds."""

    label: str
    x: float
    x_interval: tuple[float, float] | None
    trait: float
    interval: tuple[float, float]


def spots(paths: Sequence[Sequence[Point]], key: str) -> list[Spot]:
    """Means over seeds with the least and the greatest; of one seed, the trait's interval over
    vignettes. `key` is the coordinate beside the trait: mass, survival or coherence. A path that
    ended early ends all."""
    found = []
    for step in zip(*paths, strict=False):
        xs, ys = [getattr(point, key) for point in step], [point.trait for point in step]
        many = len(step) > 1
        found.append(
            Spot(
                step[0].label,
                fmean(xs),
                (min(xs), max(xs)) if many else None,
                fmean(ys),
                (min(ys), max(ys)) if many else step[0].interval,
            )
        )
    return found


def reach(path: Sequence[Point], level: float) -> float:
    """The largest trait shift along an arm's path at a coherence of `level` or more, nats.

    The path is straight from base (coherence 1, shift 0) through the arm's points in order.

    Example:
        >>> half = Point("a", 0, "0", 1.0, (1, 1), 0.5, 1.0)
        >>> reach([half], 0.75), reach([half], 0.5), reach([], 0.9)
        (0.5, 1.0, 0.0)
    """
    best, before = 0.0, (1.0, 0.0)
    for point in path:
        now = (point.coherence, point.trait)
        inside = [t for c, t in (before, now) if c >= level]
        if min(before[0], now[0]) < level < max(before[0], now[0]):
            share = (level - before[0]) / (now[0] - before[0])
            inside.append(before[1] + share * (now[1] - before[1]))
        best = max([best, *inside])
        before = now
    return best


def spread(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean over seeds (Student's t); None with fewer than two.

    Example:
        >>> [round(x, 2) for x in spread([1.0, 2.0, 3.0])]  # 2 -+ 4.303 / sqrt(3)
        [-0.48, 4.48]
    """
    if len(values) < 2:
        return None
    half = _T95[min(len(values) - 2, len(_T95) - 1)] * stdev(values) / len(values) ** 0.5
    return fmean(values) - half, fmean(values) + half


def table(found: Found) -> list[dict[str, Any]]:
    """One row per arm: where it ends, and how far it gets at each level of coherence; means over
    seeds, with every seed's own numbers beside them."""
    rows = []
    for name, by_seed in found.items():
        paths = {seed: path for seed, path in by_seed.items() if path}
        if not paths:
            continue
        last = [path[-1] for path in paths.values()]
        row: dict[str, Any] = {"arm": name, "seeds": sorted(paths)}
        if name != "persona":
            reached = {
                f"{level:g}": [reach(path, level) for path in paths.values()] for level in LEVELS
            }
            row["reach"] = {
                key: {"mean": fmean(v), "interval": spread(v), "each": v}
                for key, v in reached.items()
            }
        for key in ("trait", "mass", "survival", "coherence"):
            each = [getattr(point, key) for point in last]
            row[key] = {"mean": fmean(each), "interval": spread(each), "each": each}
        rows.append(row)
    return rows


def against(found: Found, arm: str, rival: str, level: float) -> dict[str, Any]:
    """Whether an arm gets further than another at the same coherence: yes, no or undecided.

    Differences are paired by seed. The rival "persona" is one point and not a path: it is met at
    its own coherence or `level`, whichever is lower, and on the larger of its two readings.
    """
    each = []
    for seed in sorted(set(found.get(arm, {})) & set(found.get(rival, {}))):
        theirs = found[rival][seed]
        if rival == "persona":
            at = min(level, theirs[0].coherence)
            bar = max(point.trait for point in theirs)
        else:
            at, bar = level, reach(theirs, level)
        each.append(reach(found[arm][seed], at) - bar)
    interval = spread(each)
    verdict = "undecided"
    if interval is not None:
        verdict = "yes" if interval[0] > 0 else "no" if interval[1] <= 0 else "undecided"
    return {
        "arm": arm,
        "rival": rival,
        "level": level,
        "verdict": verdict,
        "each": each,
        "mean": fmean(each) if each else None,
        "interval": interval,
    }
