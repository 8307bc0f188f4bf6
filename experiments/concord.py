"""Whether two instruments agree on what a run moved, claimed only where both are valid."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from experiments.validity import Validity
from shl.errors import check
from shl.evaluation import log_softmax, nats_of
from shl.seeds import seed_for

READOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "log mean probability": nats_of,
    "mean log-probability": lambda x: x.mean(0),
    "mean log-ratio": lambda x: (x - x.mean(-1, keepdims=True)).mean(0),
}
"""`[item, foundation]` log-probabilities to one number per foundation."""


@dataclass(frozen=True)
class Reading:
    """One instrument on a run: `[item, foundation]` log-probabilities of base and of each stage."""

    base: np.ndarray
    stages: Mapping[str, np.ndarray]

    @classmethod
    def of(
        cls, base: np.ndarray, stages: Mapping[str, np.ndarray], *, calibrated: bool
    ) -> "Reading":
        """From raw scores `[item, paraphrase, foundation]`."""
        prior = base.mean(0, keepdims=True) if calibrated else 0.0
        read = {name: log_softmax((x - prior).mean(1)) for name, x in stages.items()}
        return cls(log_softmax((base - prior).mean(1)), read)

    def shifts(self, readout: str, items: np.ndarray) -> np.ndarray:
        """Shift from base per stage and foundation, on some items, in one row."""
        of = READOUTS[readout]
        return np.concatenate([of(x[items]) - of(self.base[items]) for x in self.stages.values()])


@dataclass(frozen=True)
class Concord:
    """Spearman's rank correlation of two instruments' shifts on items that chose nothing."""

    spearman: float
    interval: tuple[float, float]
    readout: str
    shifts: int

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"Spearman {self.spearman:.2f} (95 % {low:+.2f} to {high:+.2f}) over {self.shifts} "
            f"shifts, {self.readout}, on the half of the items that did not choose it"
        )


def concord(
    one: Reading,
    other: Reading,
    validities: tuple[Validity, Validity],
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Concord | str:
    """How far two instruments agree on the shifts of the same stages, or why nothing is claimed.

    The readout is chosen on one half of either's items, where it agrees best, and reported on the
    other half, with a bootstrap interval over that half's items.

    Raises:
        ShlError: other stages in the one than in the other, or fewer than four items.
    """
    invalid = [f"{v.instrument} is not valid here: {v.reason}" for v in validities if not v.valid]
    if invalid:
        return "no agreement is claimed; " + " ".join(invalid)
    check(
        list(one.stages) == list(other.stages),
        f"the stages are {list(one.stages)} and {list(other.stages)}, they must be the same.",
    )
    rng = np.random.default_rng(seed_for(seed, "concord"))
    halves = []
    for reading in (one, other):
        check(len(reading.base) >= 4, f"{len(reading.base)} items cannot be split in halves.")
        order = rng.permutation(len(reading.base))
        halves.append((order[: len(order) // 2], order[len(order) // 2 :]))
    (tune_a, tell_a), (tune_b, tell_b) = halves

    def rho(readout: str, a: np.ndarray, b: np.ndarray) -> float:
        return spearman(one.shifts(readout, a), other.shifts(readout, b))

    best = max(READOUTS, key=lambda name: rho(name, tune_a, tune_b))
    draws = [
        rho(best, rng.choice(tell_a, len(tell_a)), rng.choice(tell_b, len(tell_b)))
        for _ in range(resamples)
    ]
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    count = len(one.shifts(best, tell_a))
    return Concord(rho(best, tell_a, tell_b), (float(low), float(high)), best, count)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation of ranks, ties sharing their mean rank (Spearman 1904); 0 where one side
    is constant.

    Example:
        >>> spearman(np.array([1.0, 2.0, 3.0]), np.array([1.0, 4.0, 9.0]))
        1.0
    """
    one, other = _ranks(a), _ranks(b)
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    return float(np.clip(np.corrcoef(one, other)[0, 1], -1, 1))


def _ranks(x: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return ((last - counts + 1 + last) / 2)[place]
