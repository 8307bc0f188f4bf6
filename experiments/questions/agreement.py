"""Whether the other instruments of a run agree with our vignettes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.questions.estimates import Answer
from experiments.questions.measurements import Measured
from experiments.record.reader import Event
from shl.config import EvalConfig
from shl.measure.evaluation import log_softmax, nats_of
from shl.measure.validity import Validity, validity
from shl.method.axes import Axis
from shl.utils.errors import require
from shl.utils.seeds import seed_for


def validities(events: Sequence[Event], axis: Axis, config: EvalConfig) -> list[Validity]:
    """One verdict per instrument that read base and both personas; our vignettes first."""
    found = []
    for instrument in instruments(events):
        base, plus, minus = (
            line_of(events, instrument, stage) for stage in ("base", "prompted+", "prompted-")
        )
        if base is None or plus is None or minus is None:
            continue
        found.append(
            validity(
                instrument,
                scores(base),
                scores(plus),
                scores(minus),
                base["labels"],
                axis.expected,
                calibrated=calibrated(base),
                config=config,
            )
        )
    return found


def instruments(events: Sequence[Event]) -> list[str]:
    """Those that a record has readings of."""
    others = [e["instrument"] for e in events if e["event"] == "reading"]
    return list(dict.fromkeys(["vignettes", *others]))


def line_of(events: Sequence[Event], instrument: str, stage: str, index: int = -1) -> Event | None:
    """An instrument's line of one stage."""
    for e in events:
        own = "vignettes" if e["event"] == "stage" else e.get("instrument")
        reads = e["event"] in ("stage", "reading")
        if reads and (own, e["stage"], e["round"]) == (instrument, stage, index):
            return e
    return None


def scores(line: Event) -> np.ndarray:
    """`[item, paraphrase, foundation]` of a line, NaN where there was no answer."""
    return np.array(line["log_probs"], dtype=np.float64)


def calibrated(line: Event) -> bool:
    """Whether base's mean over vignettes has to come off: completions have a prior of their own."""
    return bool(line.get("style") == "completion")


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
    require(
        list(one.stages) == list(other.stages),
        f"the stages are {list(one.stages)} and {list(other.stages)}, they must be the same.",
    )
    rng = np.random.default_rng(seed_for(seed, "concord"))
    halves = []
    for reading in (one, other):
        require(len(reading.base) >= 4, f"{len(reading.base)} items cannot be split in halves.")
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


def agreement(m: Measured) -> Answer | None:
    """Spearman of the shifts that two instruments read, where both are valid; None where our
    vignettes are the only one."""
    others = [name for name in instruments(m.events) if name != "vignettes"]
    if not others:
        return None
    valid = {v.instrument: v for v in validities(m.events, m.axis, m.config)}
    parts, figures = [], {}
    for name in others:
        stages = _both(m.events, name)
        if name not in valid or not stages:
            said: Concord | str = "no stage beside base has been read by both yet"
        else:
            said = concord(
                _reading(m.events, "vignettes", stages),
                _reading(m.events, name, stages),
                (valid["vignettes"], valid[name]),
                resamples=m.config.bootstrap,
                confidence=m.config.confidence,
            )
        parts.append(f"{name}: {str(said).rstrip('.')}.")
        figures[name] = vars(said) if isinstance(said, Concord) else {"reason": said}
    return Answer("agreement", "do the instruments agree?", "told", " ".join(parts), figures)


def _both(events: Sequence[Event], name: str) -> list[tuple[str, int]]:
    """Stages beside base that our vignettes and another instrument have read."""
    found = [(e["stage"], e["round"]) for e in events if e["event"] == "stage"]
    return [
        (stage, index)
        for stage, index in found
        if stage != "base" and line_of(events, name, stage, index) is not None
    ]


def _reading(events: Sequence[Event], name: str, stages: Sequence[tuple[str, int]]) -> Reading:
    """An instrument on base and on these stages, items without an answer in any left out."""
    base = line_of(events, name, "base")
    assert base is not None
    lines = [line_of(events, name, stage, index) for stage, index in stages]
    every = [scores(line) for line in (base, *lines) if line is not None]
    answered = np.all([~np.isnan(x).any((1, 2)) for x in every], axis=0)
    first, *rest = (x[answered] for x in every)
    named = {f"{stage} {index}": x for (stage, index), x in zip(stages, rest, strict=True)}
    return Reading.of(first, named, calibrated=calibrated(base))
