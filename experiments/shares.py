"""Intervals for shares of judged texts, which do not vanish where all or none are kept.

A bootstrap of sixteen kept samples has no width: it knows no other sample. Wilson's interval has
one, and a difference of two shares takes its width from theirs.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

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
