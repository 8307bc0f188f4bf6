"""How far an instrument can be trusted on a model: arrays in, a verdict with its figures out.

Three checks, all of which must pass. *Informedness*: what the reading names on base agrees with
the labels beyond chance. *Sign*: the positive persona moves every foundation of the axis the way
the axis expects, against the negative persona, in every paraphrase (stem, option order, frame).
*Split-half*: the persona contrast is the same profile on either half of the vignettes. None of
them alone will do: a reading of the prompt's wording is perfectly repeatable, and wrong.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from shl.config import FOUNDATIONS, EvalConfig
from shl.measure.evaluation import log_softmax, nats_of
from shl.measure.stats import bootstrap, split_half
from shl.utils.errors import require

CHANCE = 0.05
"""Informedness must have a smaller permutation p than this: the usual level of one test."""
RELIABLE = 0.7
"""Least split-half reliability of the persona contrast: the common floor for comparing groups
(Nunnally 1978), below which half of the profile's variance is noise."""
DRAWS = 10_000
"""Permutations; the smallest p is 1 in this many."""


@dataclass(frozen=True)
class Foundation:
    """One foundation of the axis: its own informedness, and its contrast over all paraphrases."""

    informedness: float
    informedness_p: float
    contrast: float  # nats, prompted+ minus prompted-
    interval: tuple[float, float]
    expected: int
    valid: bool


@dataclass(frozen=True)
class Validity:
    """Whether `instrument` is valid on a model, and the figures that decide.

    `agreement` is the persona contrast in nats per paraphrase, `agreement_interval` its bootstrap
    intervals over vignettes; `unscorable` vignettes gave no number in some reading and are left
    out of `items`.
    """

    instrument: str
    valid: bool
    reason: str
    informedness: float
    informedness_p: float
    split_half: float
    agreement: dict[str, list[float]]
    agreement_interval: dict[str, list[tuple[float, float]]]
    foundations: dict[str, Foundation]
    items: int
    unscorable: int

    def event(self) -> dict[str, Any]:
        """As the record holds it."""
        return asdict(self)


def informedness(chosen: np.ndarray, labels: np.ndarray, k: int | None = None) -> float:
    """Multi-class informedness: mean over the labels' classes of TPR - FPR, Youden's J of each
    class against the rest (Youden 1950; Powers 2011). 0 is chance, whatever the base rates.

    Args:
        k: of this class alone.

    Example:
        >>> informedness(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 0]))
        0.6666666666666667
    """
    return float(_informedness(chosen, labels[None], k)[0])


def permutation_p(
    chosen: np.ndarray, labels: np.ndarray, k: int | None = None, *, draws: int = DRAWS
) -> float:
    """Chance that shuffled labels reach the observed informedness (one-sided)."""
    rng = np.random.default_rng(0)
    shuffled = rng.permuted(np.tile(labels, (draws, 1)), axis=1)
    # Sums in another order must not turn a tie into a miss.
    reached = _informedness(chosen, shuffled, k) >= informedness(chosen, labels, k) - 1e-12
    return float((reached.sum() + 1) / (draws + 1))


def _informedness(chosen: np.ndarray, labels: np.ndarray, k: int | None) -> np.ndarray:
    """Per row of `labels` `[draw, item]`; 0 where there is no second class to tell from."""
    classes = np.unique(labels[0])
    if len(classes) < 2 or (k is not None and k not in classes):
        return np.zeros(len(labels))
    each = []
    for f in classes if k is None else [k]:
        own, said = labels == f, chosen == f
        hits = (own & said).sum(1)
        own_count = int(own[0].sum())
        each.append(hits / own_count - (said.sum() - hits) / (len(chosen) - own_count))
    return np.mean(each, axis=0)


def validity(
    instrument: str,
    base: np.ndarray,
    plus: np.ndarray,
    minus: np.ndarray,
    labels: Sequence[str],
    expected: Mapping[str, int],
    *,
    calibrated: bool = False,
    config: EvalConfig | None = None,
) -> Validity:
    """Check an instrument on a model.

    Args:
        base, plus, minus: `[item, paraphrase, foundation]`, log-probabilities in nats without a
            persona, and under the positive and the negative one; NaN where there is no answer.
        labels: what each vignette was written for.
        expected: the axis's sign per foundation.
        calibrated: whether base's mean over vignettes is taken off first, as completions need it.

    Raises:
        ShlError: arrays that do not belong together, or too few vignettes to split.
    """
    config = config or EvalConfig()
    require(
        base.shape == plus.shape == minus.shape
        and base.ndim == 3
        and base.shape[0] == len(labels)
        and base.shape[2] == len(FOUNDATIONS),
        f"the scores have shapes {base.shape}, {plus.shape} and {minus.shape} for {len(labels)} "
        f"labels, all must be (item, paraphrase, {len(FOUNDATIONS)}).",
    )
    scored = np.isfinite(base + plus + minus).all((1, 2))
    require(int(scored.sum()) >= 4, f"{int(scored.sum())} vignettes have scores, it takes four.")
    base, plus, minus = base[scored], plus[scored], minus[scored]
    intended = np.array([FOUNDATIONS.index(label) for label in labels])[scored]
    prior = base.mean(0, keepdims=True) if calibrated else np.zeros((1, 1, 1))
    chosen = (base - prior).mean(1).argmax(1)
    j, p = informedness(chosen, intended), permutation_p(chosen, intended)
    # `[item, asked, foundation]`: each paraphrase alone, and last all of them together.
    up, down = (
        np.concatenate([log_softmax(x - prior), log_softmax((x - prior).mean(1, keepdims=True))], 1)
        for x in (plus, minus)
    )
    profile = up[:, -1] - down[:, -1]
    flat = float(np.ptp(profile.mean(0))) < 1e-12  # no profile, nothing that could repeat itself
    reliability = 0.0 if flat else split_half(profile)
    agreement: dict[str, list[float]] = {}
    intervals: dict[str, list[tuple[float, float]]] = {}
    each: dict[str, Foundation] = {}
    for name, sign in expected.items():
        k = FOUNDATIONS.index(name)
        pairs = np.stack([up[:, :, k], down[:, :, k]], -1)
        contrasts = [_contrast(pairs[:, a]) for a in range(pairs.shape[1])]
        bounds = [_interval(pairs[:, a], config) for a in range(pairs.shape[1])]
        agreement[name], intervals[name] = contrasts[:-1], bounds[:-1]
        j_k, p_k = informedness(chosen, intended, k), permutation_p(chosen, intended, k)
        right = _agrees(contrasts, bounds[-1], sign)
        each[name] = Foundation(
            j_k, p_k, contrasts[-1], bounds[-1], sign, p_k < CHANCE and j_k > 0 and right
        )
    failed = _failures(j, p, reliability, agreement, each)
    says = (
        f"informedness {j:.2f} (permutation p {p:.4f}), the persona contrast has the expected sign "
        f"in every paraphrase, split-half {reliability:.2f}."
    )
    return Validity(
        instrument,
        not failed,
        f"{'; '.join(failed)}." if failed else says,
        j,
        p,
        reliability,
        agreement,
        intervals,
        each,
        int(scored.sum()),
        int((~scored).sum()),
    )


def _agrees(contrasts: Sequence[float], interval: tuple[float, float], sign: int) -> bool:
    """The expected sign in every paraphrase, and beyond its interval over all of them."""
    return all(sign * c > 0 for c in contrasts) and min(sign * x for x in interval) > 0


def _failures(
    j: float,
    p: float,
    reliability: float,
    agreement: Mapping[str, Sequence[float]],
    each: Mapping[str, Foundation],
) -> list[str]:
    """What did not pass, with the figures."""
    failed = []
    if not (p < CHANCE and j > 0):
        failed.append(f"informedness is {j:.2f} (permutation p {p:.4f}, it takes {CHANCE:g})")
    for name, found in each.items():
        contrasts = [*agreement[name], found.contrast]
        if not _agrees(contrasts, found.interval, found.expected):
            listed = ", ".join(f"{c:+.2f}" for c in agreement[name])
            low, high = found.interval
            failed.append(
                f"the persona contrast of {name} is {listed} nats by paraphrase and "
                f"{found.contrast:+.2f} ({low:+.2f} to {high:+.2f}) over all, "
                f"{'above' if found.expected > 0 else 'below'} 0 is expected"
            )
    if reliability < RELIABLE:
        failed.append(f"split-half reliability is {reliability:.2f}, it takes {RELIABLE:g}")
    return failed


def _contrast(pairs: np.ndarray) -> float:
    """`[item, 2]` log-probabilities under plus and minus: difference of log mean probability."""
    return float(-np.diff(nats_of(pairs))[0])


def _interval(pairs: np.ndarray, config: EvalConfig) -> tuple[float, float]:
    return bootstrap(pairs, _contrast, resamples=config.bootstrap, confidence=config.confidence)
