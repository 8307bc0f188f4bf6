"""A number with its interval and the side of its threshold that it lies on, and what follows.

Yes where the interval lies wholly above the threshold, no where it lies wholly below or on it,
otherwise undecided. Where several must hold: no if any is a no, yes if all are.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

Interval = tuple[float, float]


def wilson(kept: int, total: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a share (Wilson 1927).

    Example:
        >>> low, high = wilson(16, 16)
        >>> round(low, 3), high
        (0.806, 1.0)
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, scale = kept / total, 1 + z * z / total
    middle = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def difference(
    kept: Sequence[bool],
    other: Sequence[bool],
    *,
    factor: float = 1.0,
    paired: bool = False,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """Share of `kept` less `factor` times the share of `other`, with an interval.

    The distances of both shares to their Wilson limits are added in squares (Newcombe 1998, with a
    factor Zou and Donner 2008); pairs count with the phi correlation of the two columns.
    """
    a, b = sum(kept) / len(kept), sum(other) / len(other)
    (la, ha), (lb, hb) = (wilson(sum(x), len(x), confidence) for x in (kept, other))
    phi = _phi(kept, other) if paired else 0.0
    value = a - factor * b

    def half(mine: float, theirs: float) -> float:
        square = mine**2 + (factor * theirs) ** 2 - 2 * phi * factor * mine * theirs
        return math.sqrt(max(0.0, square))

    return value, value - half(a - la, hb - b), value + half(ha - a, b - lb)


def needed(factor: float, confidence: float) -> int:
    """How many samples, all of them kept in both, show a share above `factor` times the other's.

    Wilson's lower limit of n of n is n / (n + z^2), so n (1 / factor - 1) > z^2.

    Example:
        >>> needed(0.5, 0.95)
        4
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    return math.floor(z * z * factor / (1 - factor)) + 1


def rank_correlation(pairs: np.ndarray) -> float:
    """Spearman's correlation of two columns, ties sharing their mean rank; 0 where one is flat."""
    ranks = np.stack([_ranks(column) for column in pairs.T])
    spread = ranks.std(1)
    if not spread.all():
        return 0.0
    return float(np.corrcoef(ranks)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return np.asarray((last - (counts - 1) / 2)[place])


def _phi(kept: Sequence[bool], other: Sequence[bool]) -> float:
    x, y = np.array(kept, dtype=float), np.array(other, dtype=float)
    spread = x.std() * y.std()
    return float(((x - x.mean()) * (y - y.mean())).mean() / spread) if spread > 0 else 0.0


Verdict = Literal["yes", "no", "undecided", "told"]

VIGNETTES = "bootstrap over vignettes, paired"
TEXTS = "bootstrap over texts"
WILSON = "Wilson"
SHARES = "Wilson limits, added in squares"
EXACT = "a count or a sum without sampling error"


@dataclass(frozen=True)
class Figure:
    """A number that decides; yes is above `needs`.

    `value` is None where the record cannot give it, and `note` says why or from what. `trait`
    marks what rests on the probe's reading of the trait, which counts as undecided where the probe
    is in `doubt`. `soft` cannot say no; `quiet` is named without its number, where it says no yes.
    """

    what: str
    value: float | None
    low: float | None
    high: float | None
    needs: float
    by: str
    round: int | None = None
    note: str = ""
    unit: str = ""
    trait: bool = False
    soft: bool = False
    quiet: bool = False
    doubt: bool = False

    @property
    def verdict(self) -> Verdict:
        """Which side of `needs` the interval lies on."""
        if self.doubt or self.low is None or self.high is None:
            return "undecided"
        if self.low > self.needs:
            return "yes"
        return "no" if self.high <= self.needs and not self.soft else "undecided"

    @property
    def text(self) -> str:
        """The number with its interval."""
        inner = [] if self.by == EXACT else [f"{number(self.low)} to {number(self.high)}"]
        if self.value is None or not _all_finite(self):
            return self.note or "not known"
        inner += [self.note] if self.note else []
        return f"{number(self.value)}{self.unit}" + (f" ({'; '.join(inner)})" if inner else "")

    def told(self) -> dict[str, Any]:
        """As JSON, which knows no infinity."""
        return {
            "what": self.what,
            "round": self.round,
            **{key: _finite(getattr(self, key)) for key in ("value", "low", "high", "needs")},
            "unit": self.unit.strip(),
            "verdict": self.verdict,
            "by": self.by,
            "note": self.note,
        }


@dataclass(frozen=True)
class Answer:
    """A question with what was found; `figures` and `thresholds` hold all that decided."""

    key: str
    question: str
    verdict: Verdict
    sentence: str
    figures: Mapping[str, Any]
    thresholds: Mapping[str, float] = field(default_factory=dict)


def all_of(verdicts: Iterable[Verdict]) -> Verdict:
    """No if any is, yes if all are, otherwise (nothing to go by included) undecided.

    Example:
        >>> all_of(["yes", "undecided", "no"]), all_of(["yes", "undecided"]), all_of(["yes"])
        ('no', 'undecided', 'yes')
    """
    found = list(verdicts)
    if "no" in found:
        return "no"
    return "yes" if found and all(v == "yes" for v in found) else "undecided"


def any_of(verdicts: Iterable[Verdict]) -> Verdict:
    """Yes if any is, no if all are, otherwise undecided.

    Example:
        >>> any_of(["no", "undecided", "yes"]), any_of(["no", "undecided"]), any_of(["no"])
        ('yes', 'undecided', 'no')
    """
    found = list(verdicts)
    if "yes" in found:
        return "yes"
    return "no" if found and all(v == "no" for v in found) else "undecided"


SIDES: dict[Verdict, str] = {"no": "fails", "undecided": "open", "yes": "holds"}


def sentence(verdict: Verdict, figures: Sequence[Figure], *more: str) -> str:
    """The verdict; the numbers that fail, that are open, and that hold; and what else is told."""
    parts = []
    for side, word in SIDES.items():
        group = [f for f in figures if f.verdict == side and not (f.quiet and side == "yes")]
        if group:
            names = dict.fromkeys(f.what for f in group)
            listed = (_row(name, [f for f in group if f.what == name]) for name in names)
            parts.append(f"{word}: {'; '.join(listed)}")
    every = [verdict, *parts, *(m for m in more if m)]
    return ". ".join(part[0].upper() + part[1:] for part in every) + "."


def _row(name: str, group: Sequence[Figure]) -> str:
    """One number, in each of its rounds, and what it takes to hold."""
    if all(f.quiet for f in group):
        listed = ", ".join(str(f.round) for f in group if f.round is not None)
        return f"{name}, round {listed}"
    values = ", ".join(f.text if f.round is None else f"round {f.round}: {f.text}" for f in group)
    if all(f.value is None for f in group):
        return f"{name}, {values}"
    return f"{name} {values}, needs > {number(group[0].needs)}"


def number(value: float | None) -> str:
    """Two decimals, three for what is small.

    Example:
        >>> number(0.5), number(-0.012), number(None)
        ('0.50', '-0.012', 'unknown')
    """
    if value is None or not math.isfinite(value):
        return "unknown"
    if value == 0:
        return "0"
    return f"{value:.3f}" if abs(value) < 0.0995 else f"{value:.2f}"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _all_finite(figure: Figure) -> bool:
    return all(_finite(x) is not None for x in (figure.value, figure.low, figure.high))
