"""Comparison of arms at matched coherence, from their records alone."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from scipy import stats

from experiments.arms.catalogue import ARMS
from experiments.arms.doses import FILE as DOSES
from experiments.arms.doses import read_doses
from experiments.record.journal import read_lines
from experiments.record.reader import Event, RecordReader, axis_of, stages
from experiments.record.resume import scores
from shl.config import EvalConfig
from shl.measure.evaluation import nats_of, on_axis
from shl.measure.stats import bootstrap
from shl.measure.vignettes import reading
from shl.method.axes import Axis

LEVELS = (0.97, 0.9, 0.75, 0.5)
"""Shares of base's coherence at which arms are compared: Q2's threshold, and three below it."""


@dataclass(frozen=True)
class Point:
    """One model on the plane of trait against coherence.

    `trait` is the mean shift of the axis's foundations from base in the expected direction, nats,
    with its interval over vignettes of that `confidence`; `mass` and `survival` are shares of
    base's.
    """

    arm: str
    seed: int
    label: str
    trait: float
    interval: tuple[float, float]
    mass: float
    survival: float
    confidence: float = 0.95

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
        past = RecordReader(path)
        if past.find("prompted-", -1) is None:
            continue
        point = _point_of(past, name, seed)
        healed = stages(past.events, "healed")
        found.setdefault(name, {})[seed] = [point(str(e["round"]), e) for e in healed]
        if seed not in found.get("persona", {}):
            found.setdefault("persona", {})[seed] = _prompted(past, seed)
    for path in sorted(folder.glob(f"steered/seed*/{DOSES}")):
        seed = int(path.parent.name.removeprefix("seed"))
        donor = next(folder / arm / f"seed{seed}" for arm in ARMS if seed in found.get(arm, {}))
        point = _point_of(RecordReader(donor), "steered", seed)
        doses = read_doses(path)
        found.setdefault("steered", {})[seed] = [point(f"{e['dose']:.2f}", e) for e in doses]
    return {name: found[name] for name in ("persona", "steered", *ARMS) if name in found}


def _point_of(past: RecordReader, arm: str, seed: int) -> Callable[[str, Event], Point]:
    """The function that turns a label and a stage of this run into a point."""
    base, axis = past.find("base", -1), axis_of(past.folder)
    assert base is not None
    return partial(_point, arm, seed, base=base, axis=axis, config=_config(past))


def _prompted(past: RecordReader, seed: int) -> list[Point]:
    """The persona against base ("raw"), and half of its contrast to the opposite persona ("half").

    A persona's wording raises the options that share words with it, whichever way it leans; the
    contrast of two personas does not.
    """
    base, plus, minus = (past.find(name, -1) for name in ("base", "prompted+", "prompted-"))
    assert base is not None
    assert plus is not None
    assert minus is not None
    whole = _point_of(past, "persona", seed)("raw", plus)
    trait, (low, high) = _shift(plus, minus, base, axis_of(past.folder), _config(past))
    return [whole, replace(whole, label="half", trait=trait / 2, interval=(low / 2, high / 2))]


def _config(past: RecordReader) -> EvalConfig:
    return EvalConfig(**past.settings["loop"]["eval"])


def _point(
    arm: str, seed: int, label: str, line: Event, *, base: Event, axis: Axis, config: EvalConfig
) -> Point:
    survival = line["survival"] / base["survival"] if base["survival"] else 0.0
    trait = _shift(line, base, base, axis, config)
    return Point(arm, seed, label, *trait, line["coherence"], survival, config.confidence)


def _shift(
    one: Event, other: Event, base: Event, axis: Axis, config: EvalConfig
) -> tuple[float, tuple[float, float]]:
    """On-axis shift of one stage against another, and its interval paired by vignette."""
    a, b = (reading(x["style"], scores(dict(x)), scores(dict(base))) for x in (one, other))
    pairs = np.stack([a.log_p, b.log_p], 1)

    def shift(x: np.ndarray) -> float:
        return float(on_axis(nats_of(x[:, 0]) - nats_of(x[:, 1]), axis.expected))

    interval = bootstrap(pairs, shift, resamples=config.bootstrap, confidence=config.confidence)
    return shift(pairs), interval


@dataclass(frozen=True)
class SeedMean:
    """An arm's mean over seeds after a round or at a dose."""

    label: str
    x: float
    x_interval: tuple[float, float] | None
    trait: float
    interval: tuple[float, float]


def seed_means(paths: Sequence[Sequence[Point]], key: str) -> list[SeedMean]:
    """Means over seeds with the least and the greatest; for one seed, the trait's interval over
    vignettes.

    `key` is the coordinate beside the trait: mass, survival or coherence. The shortest path sets
    the number of points.
    """
    found = []
    for step in zip(*paths, strict=False):
        xs, ys = [getattr(point, key) for point in step], [point.trait for point in step]
        x_range, y_range = None, step[0].interval
        if len(step) > 1:
            x_range, y_range = (min(xs), max(xs)), (min(ys), max(ys))
        found.append(SeedMean(step[0].label, fmean(xs), x_range, fmean(ys), y_range))
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


def spread(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Interval of the mean over seeds (Student's t); None with fewer than two.

    Example:
        >>> [round(x, 2) for x in spread([1.0, 2.0, 3.0])]  # 2 -+ 4.303 / sqrt(3)
        [-0.48, 4.48]
    """
    if len(values) < 2:
        return None
    quantile = stats.t.ppf((1 + confidence) / 2, len(values) - 1)
    half = float(quantile) * stdev(values) / len(values) ** 0.5
    return fmean(values) - half, fmean(values) + half


def _confidence(points: Iterable[Point]) -> float:
    return next((point.confidence for point in points), 0.95)


def _mean(values: Sequence[float], confidence: float) -> dict[str, Any]:
    return {"mean": fmean(values), "interval": spread(values, confidence), "each": list(values)}


def table(found: Found) -> list[dict[str, Any]]:
    """One row per arm: its last point, and its largest shift at each level of coherence; means
    over seeds, and the number of every seed."""
    rows = []
    for name, by_seed in found.items():
        paths = {seed: path for seed, path in by_seed.items() if path}
        if not paths:
            continue
        last = [path[-1] for path in paths.values()]
        confidence = _confidence(last)
        row: dict[str, Any] = {"arm": name, "seeds": sorted(paths)}
        if name != "persona":
            row["reach"] = {
                f"{level:g}": _mean([reach(path, level) for path in paths.values()], confidence)
                for level in LEVELS
            }
        for key in ("trait", "mass", "survival", "coherence"):
            row[key] = _mean([getattr(point, key) for point in last], confidence)
        rows.append(row)
    return rows


def against(found: Found, arm: str, rival: str, level: float) -> dict[str, Any]:
    """Whether an arm shifts further than another at the same coherence: yes, no or undecided.

    Differences are paired by seed. The rival "persona" is one point and not a path: it is compared
    at its own coherence or `level`, whichever is lower, by the larger of its two shifts.
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
    confidence = _confidence(point for path in found.get(arm, {}).values() for point in path)
    interval = spread(each, confidence)
    low, high = interval or (0.0, 1.0)  # no interval leaves it undecided
    verdict = "yes" if low > 0 else "no" if high <= 0 else "undecided"
    return {
        "arm": arm,
        "rival": rival,
        "level": level,
        "verdict": verdict,
        "each": each,
        "mean": fmean(each) if each else None,
        "interval": interval,
        "confidence": confidence,
    }
