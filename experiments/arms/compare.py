"""Comparison of arms at matched coherence, from their records alone."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from scipy import stats

from experiments.arms.catalogue import ARMS
from experiments.arms.doses import FILE as DOSES
from experiments.arms.doses import read_doses
from experiments.questions.estimates import Estimate
from experiments.questions.measurements import Measurements
from experiments.record.journal import Line, read_lines
from experiments.record.reader import Event, RecordReader, axis_of
from shl.config import EvalConfig

LEVELS = (0.97, 0.9, 0.75, 0.5)
"""Shares of base's coherence at which arms are compared: Q2's threshold, and three below it."""


@dataclass(frozen=True)
class Point:
    """One model on the plane of trait against coherence.

    `trait` is the shift from base in the expected direction, nats, with its interval of that
    `confidence`: the cloze's where that is valid on the model, else the mean of the axis's
    foundations on the vignettes. `context` is the use of context where that is valid, else the
    valid-answer mass; it and `survival` are shares of base's. `cpu` is the CPU time of training so
    far [s]: vectors, probes, texts and healing; None where nothing was trained.
    """

    arm: str
    seed: int
    label: str
    trait: float
    interval: tuple[float, float]
    context: float
    survival: float
    confidence: float = 0.95
    cpu: float | None = None

    @property
    def coherence(self) -> float:
        """The worse of the use of context and free-sample survival over base's, at most 1."""
        return min(1.0, self.context, self.survival)


Found = Mapping[str, Mapping[int, Sequence[Point]]]
"""Points by arm and seed, each path in its order."""


def points(folder: Path) -> dict[str, dict[int, list[Point]]]:
    """By arm and seed: the healed student of each round, each dose of the steered one, and the
    prompted personas.

    One instrument reads the trait of all: the cloze if it is valid in the first run that is steered
    along the axis. A random vector, or none, says nothing about its validity.
    """
    found: dict[str, dict[int, list[Point]]] = {}
    runs = [path for name in ARMS for path in sorted((folder / name).glob("seed*"))]
    pasts = [RecordReader(path) for path in runs if read_lines(path / "events.jsonl")]
    measured = [(past, _measured(past)) for past in pasts if past.find("prompted-", -1)]
    along = (m.reads_cloze for past, m in measured if _along_the_axis(past, m))
    reads_cloze = next(along, None)
    for past, m in measured:
        name, seed = past.folder.parent.name, int(past.folder.name.removeprefix("seed"))
        _read_by(m, reads_cloze)
        found.setdefault(name, {})[seed] = [
            replace(
                _point(m, name, seed, str(e["round"]), e), cpu=training_cpu(past.events, e["round"])
            )
            for e in m.healed
        ]
        if seed not in found.get("persona", {}):
            found.setdefault("persona", {})[seed] = _prompted(m, seed)
    for path in sorted(folder.glob(f"steered/seed*/{DOSES}")):
        seed = int(path.parent.name.removeprefix("seed"))
        donor = next(folder / arm / f"seed{seed}" for arm in ARMS if seed in found.get(arm, {}))
        doses = read_doses(path)
        first = RecordReader(donor)
        first.events = [e for e in first.events if e["round"] < 0]
        m = _measured(first, doses)
        _read_by(m, reads_cloze)
        labels = [f"{e['dose']:.2f}" for e in doses]
        found.setdefault("steered", {})[seed] = [
            _point(m, "steered", seed, label, e) for label, e in zip(labels, m.steered, strict=True)
        ]
    return {name: found[name] for name in ("persona", "steered", *ARMS) if name in found}


def training_cpu(events: Sequence[Event], last: int) -> float | None:
    """CPU seconds of training up to a round; None for a record without CPU times.

    A stage that was interrupted counts what its last process took.

    Example:
        >>> line = {"event": "healing", "round": 0, "cpu": 2.0}
        >>> training_cpu([line, line | {"round": 1}, line | {"event": "stage"}], 0)
        2.0
    """
    stages = ("vector", "probe", "batch", "healing")
    own = [e for e in events if e["event"] in stages and e["round"] <= last]
    times = [float(e["cpu"]) for e in own if e.get("cpu") is not None]
    return sum(times) if len(times) == len(own) else None


def _along_the_axis(past: RecordReader, m: Measurements) -> bool:
    contrast = past.settings["loop"]["vector"]["direction"] == "contrast"
    return contrast and bool(m.steered) and m.steered[0]["dose"] != 0


def _read_by(m: Measurements, reads_cloze: bool | None) -> None:
    if reads_cloze is not None:
        m.reads_cloze = reads_cloze


def _measured(past: RecordReader, doses: Sequence[Line] = ()) -> Measurements:
    """The stages of a run, and those of a ladder of doses as rounds of their own."""
    events: list[Line] = list(past.events)
    for number, line in enumerate(doses):
        stage = {**line, "event": "stage", "stage": "steered", "round": number}
        events.append(stage)
        for name, items in line["items"].items():
            found = {"event": "items", "instrument": name, "stage": "steered", "items": items}
            events.append(found | {"round": number})
    config = EvalConfig(**past.settings["loop"]["eval"])
    return Measurements(events, past.texts, axis_of(past.folder), config)


def _point(m: Measurements, arm: str, seed: int, label: str, stage: Event) -> Point:
    """A measured stage on the plane."""
    base = m.base["survival"]
    coherence, _, _ = _limits(m.ratio("coherence", [stage], LEVELS[0]))
    return Point(
        arm,
        seed,
        label,
        *_trait(m, [stage], lambda shifts: float(shifts[0])),
        coherence,
        stage["survival"] / base if base else 0.0,
        m.config.confidence,
    )


def _limits(estimate: Estimate) -> tuple[float, float, float]:
    assert estimate.limits is not None
    return estimate.limits


def _trait(
    m: Measurements, found: Sequence[Event], statistic: Callable[[np.ndarray], float]
) -> tuple[float, tuple[float, float]]:
    value, low, high = _limits(m.shift("shift", found, statistic))
    return value, (low, high)


def _prompted(m: Measurements, seed: int) -> list[Point]:
    """The persona against base ("raw"), and half of its contrast to the opposite persona ("half").

    A persona's wording raises the options that share words with it, whichever way it leans; the
    contrast of two personas does not.
    """
    plus, minus = m.first("prompted+"), m.first("prompted-")
    assert plus is not None
    assert minus is not None
    whole = _point(m, "persona", seed, "raw", plus)
    trait, interval = _trait(m, [plus, minus], lambda shifts: float(shifts[0] - shifts[1]) / 2)
    return [whole, replace(whole, label="half", trait=trait, interval=interval)]


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

    `key` is the coordinate beside the trait: context, survival or coherence. The shortest path sets
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
        for key in ("trait", "context", "survival", "coherence"):
            row[key] = _mean([getattr(point, key) for point in last], confidence)
        if all(point.cpu is not None for point in last):
            row["cpu"] = _mean([point.cpu for point in last if point.cpu is not None], confidence)
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
