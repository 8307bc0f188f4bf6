"""Estimates with intervals, their outcome against a threshold, and the answers built from them.

Yes where the interval lies wholly above the threshold, no where it lies wholly below or on it,
otherwise undecided. Where several must hold: no if any is a no, yes if all are.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from scipy import stats

from experiments.record.journal import finite

Outcome = Literal["yes", "no", "undecided", "info"]
"""`info` is an answer that gives figures and decides nothing."""

SHARES = "Newcombe, from Wilson limits"
EXACT = "a count or a sum without sampling error"


def wilson(kept: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927).

    Example:
        >>> low, high = wilson(16, 16)
        >>> round(low, 3), high
        (0.806, 1.0)
    """
    found = stats.binomtest(kept, total).proportion_ci(confidence, method="wilson")
    return float(found.low), float(found.high)


def difference(
    kept: Sequence[bool],
    other: Sequence[bool],
    *,
    factor: float = 1.0,
    paired: bool = False,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """Share of `kept` less `factor` times the share of `other`, with its interval.

    The distances of both shares to their Wilson limits are added in squares (Newcombe 1998, with a
    factor Zou and Donner 2008); pairs count with the phi correlation of the two columns.
    """
    a, b = sum(kept) / len(kept), sum(other) / len(other)
    (la, ha), (lb, hb) = (wilson(sum(x), len(x), confidence) for x in (kept, other))
    varies = 0 < a < 1 and 0 < b < 1
    phi = float(np.corrcoef(kept, other)[0, 1]) if paired and varies else 0.0
    value = a - factor * b

    def half(first: float, second: float) -> float:
        square = first**2 + (factor * second) ** 2 - 2 * phi * factor * first * second
        return math.sqrt(max(0.0, square))

    return value, value - half(a - la, hb - b), value + half(ha - a, b - lb)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation, ties sharing their mean rank; 0 where one side is constant.

    Example:
        >>> spearman(np.array([1.0, 2.0, 3.0]), np.array([1.0, 4.0, 9.0]))
        1.0
    """
    if (a == a[0]).all() or (b == b[0]).all():
        return 0.0
    # stats.spearmanr takes four times as long, which counts in a bootstrap.
    return float(np.corrcoef(stats.rankdata(np.stack([a, b]), axis=1))[0, 1])


@dataclass(frozen=True)
class Estimate:
    """A number with its interval and the threshold that it must exceed.

    `limits` are the value and its interval, None where the record cannot give them, and `note` says
    why. `trait` marks what rests on the vignettes' reading of the trait, which counts as undecided
    where that is in `doubt`. `soft` cannot be a no; `quiet` is not listed where it is a yes.
    """

    what: str
    limits: tuple[float, float, float] | None
    threshold: float
    method: str
    round: int | None = None
    note: str = ""
    unit: str = ""
    trait: bool = False
    soft: bool = False
    quiet: bool = False
    doubt: bool = False

    @property
    def outcome(self) -> Outcome:
        """The side of the threshold on which the interval lies."""
        if self.doubt or self.limits is None:
            return "undecided"
        _, low, high = self.limits
        if low > self.threshold:
            return "yes"
        return "no" if high <= self.threshold and not self.soft else "undecided"

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """Name, value, interval and threshold as texts; the name says so if the value is unknown.

        Example:
            >>> Estimate("shift", (0.5, 0.25, 0.75), 0.0, SHARES, 1, unit=" nats").cells
            ('shift (round 1)', '0.50 nats', '0.25 to 0.75', '> 0')
        """
        name = self.what + ("" if self.round is None else f" (round {self.round})")
        if self.limits is None or None in map(finite, self.limits):
            return f"{name}: {self.note or 'not known'}", "", "", ""
        value, low, high = map(number, self.limits)
        interval = "" if self.method == EXACT else f"{low} to {high}"
        return name, f"{value}{self.unit}", interval, f"> {number(self.threshold)}"

    @property
    def margin(self) -> float:
        """Distance of the value above the threshold, in units of the interval's lower half;
        infinite where that has no width, or the value is unknown."""
        value, low, _ = self.limits or (math.inf, math.inf, math.inf)
        return (value - self.threshold) / (value - low) if low < value < math.inf else math.inf

    def __str__(self) -> str:
        name, value, interval, threshold = self.cells
        if not value:
            return name
        inner = "; ".join(filter(None, (interval, self.note)))
        return f"{name} {value}{f' ({inner})' if inner else ''}, must be above {threshold[2:]}"

    def as_json(self) -> dict[str, Any]:
        """The estimate in answers.json; null in place of infinity."""
        value, low, high = map(finite, self.limits or (None, None, None))
        return {
            "what": self.what,
            "round": self.round,
            "value": value,
            "low": low,
            "high": high,
            "needs": self.threshold,
            "unit": self.unit.strip(),
            "verdict": self.outcome,
            "by": self.method,
            "note": self.note,
        }


@dataclass(frozen=True)
class Answer:
    """The answer to a question; `figures` and `thresholds` hold everything that decided it, and
    `estimates` those of the figures that have a threshold."""

    key: str
    question: str
    verdict: Outcome
    sentence: str
    figures: Mapping[str, Any]
    thresholds: Mapping[str, float] = field(default_factory=dict)
    estimates: tuple[Estimate, ...] = ()

    @property
    def deciding(self) -> Estimate | None:
        """The estimate that decides the answer, see `deciding`."""
        return deciding(self.verdict, self.estimates)


def all_of(outcomes: Iterable[Outcome]) -> Outcome:
    """No if any is, yes if all are, otherwise (and for none at all) undecided.

    Example:
        >>> all_of(["yes", "undecided", "no"]), all_of(["yes", "undecided"]), all_of(["yes"])
        ('no', 'undecided', 'yes')
    """
    found = set(outcomes)
    return "no" if "no" in found else "yes" if found == {"yes"} else "undecided"


def deciding(outcome: Outcome, estimates: Sequence[Estimate]) -> Estimate | None:
    """The estimate that decides an answer: of those with the answer's outcome the first; where all
    estimates are a yes, the one closest to its threshold by `margin`, quiet ones only if there are
    no others. None where no estimate has that outcome, so that something else decides.

    Example:
        >>> wide = Estimate("wide", (0.5, 0.25, 0.75), 0.0, SHARES)  # 2 halves above 0
        >>> narrow = Estimate("narrow", (0.4, 0.3, 0.5), 0.0, SHARES)  # 4 halves
        >>> deciding("yes", [narrow, wide]).what
        'wide'
    """
    same = [e for e in estimates if e.outcome == outcome]
    if outcome == "yes" and len(same) == len(estimates):
        same.sort(key=lambda e: (e.quiet, e.margin))
    return next(iter(same), None)


def sentence(outcome: Outcome, estimates: Sequence[Estimate], *notes: str) -> str:
    """The outcome; the estimate that decides it; the names of the others; the notes."""
    first = deciding(outcome, estimates)
    parts = ["" if outcome == "info" else outcome, str(first or "")]
    for side, label in (("no", "fails"), ("undecided", "open"), ("yes", "holds")):
        rounds: dict[str, list[str]] = {}
        for e in estimates:
            if e is not first and e.outcome == side and not (e.quiet and side == "yes"):
                rounds.setdefault(e.what, []).extend([] if e.round is None else [str(e.round)])
        names = [f"{what} (round {', '.join(k)})" if k else what for what, k in rounds.items()]
        parts += [f"{label}: {'; '.join(names)}"] if names else []
    return paragraph([*parts, *notes])


def paragraph(parts: Iterable[str]) -> str:
    """Parts as sentences, empty ones left out.

    Example:
        >>> paragraph(["yes", "", "all 3 hold."])
        'Yes. All 3 hold.'
    """
    return " ".join(f"{part[0].upper()}{part[1:].rstrip('.')}." for part in parts if part)


def number(value: float | None) -> str:
    """Two decimals, three for what is small.

    Example:
        >>> number(0.5), number(-0.012), number(None)
        ('0.50', '-0.012', 'unknown')
    """
    if value is None or not math.isfinite(value):
        return "unknown"
    return "0" if value == 0 else f"{value:.3f}" if abs(value) < 0.0995 else f"{value:.2f}"
