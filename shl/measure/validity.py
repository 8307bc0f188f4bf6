"""Validity of an instrument on a model.

Three checks must pass. *Informedness*: the foundations chosen on base agree with the labels beyond
chance. *Sign*: between the positive and the negative persona every foundation of the axis moves as
the axis expects, in every paraphrase (stem, option order, frame). *Split-half*: the persona
contrast has the same profile on both halves of the vignettes. No check is enough alone: an
instrument that responds to the prompt's wording only is repeatable, and wrong.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import log_softmax

from shl.config import FOUNDATIONS, EvalConfig
from shl.measure.evaluation import contrast, interval
from shl.measure.stats import split_half
from shl.utils.errors import require

CHANCE = 0.05
"""The permutation p of informedness must be below this, the usual level of one test."""
RELIABLE = 0.7
"""Least split-half reliability of the persona contrast, the common minimum for comparing groups
(Nunnally 1978); below it half of the profile's variance is noise."""
DRAWS = 10_000
"""Permutations; the smallest p is one in this many."""


@dataclass(frozen=True)
class Foundation:
    """A foundation of the axis: its informedness, and its contrast over all paraphrases."""

    informedness: float
    informedness_p: float
    contrast: float  # nats, prompted+ minus prompted-
    interval: tuple[float, float]
    expected: int
    valid: bool


@dataclass(frozen=True)
class Validity:
    """Whether an instrument is valid on a model, and the figures that decide it.

    `agreement` is the persona contrast in nats per paraphrase, `agreement_interval` its bootstrap
    intervals over vignettes; the `items` leave out `unscorable` vignettes, which lack a score in
    some paraphrase.
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
        """The validity as a line of the record."""
        return asdict(self)


def informedness(chosen: np.ndarray, labels: np.ndarray, k: int | None = None) -> float:
    """Multi-class informedness: mean over the labels' classes of TPR - FPR, Youden's J of each
    class against the rest (Youden 1950; Powers 2011), or that of class `k` alone. Chance is 0 at
    any base rates.

    Example:
        >>> informedness(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 0]))
        0.6666666666666667
    """
    return float(_informedness(chosen, labels[None], k)[0])


def permutation_p(
    chosen: np.ndarray, labels: np.ndarray, k: int | None = None, *, draws: int = DRAWS
) -> float:
    """Probability that shuffled labels reach the observed informedness (one-sided)."""
    rng = np.random.default_rng(0)
    shuffled = rng.permuted(np.tile(labels, (draws, 1)), axis=1)
    # The tolerance counts ties that differ by rounding.
    reached = _informedness(chosen, shuffled, k) >= informedness(chosen, labels, k) - 1e-12
    return float((reached.sum() + 1) / (draws + 1))


def _informedness(chosen: np.ndarray, labels: np.ndarray, k: int | None) -> np.ndarray:
    """Informedness per row of `labels` `[draw, item]`; 0 where there is no second class."""
    classes = np.unique(labels[0])
    if len(classes) < 2 or (k is not None and k not in classes):
        return np.zeros(len(labels))
    each = []
    for f in classes if k is None else [k]:
        positive, predicted = labels == f, chosen == f
        hits, count = (positive & predicted).sum(1), int(positive[0].sum())
        each.append(hits / count - (predicted.sum() - hits) / (len(chosen) - count))
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
        labels: the foundation that each vignette was written for.
        expected: the axis's sign per foundation; without any the instrument is not valid.
        calibrated: whether base's mean over vignettes is subtracted, as completions need it.

    Raises:
        ShlError: arrays of different or wrong shapes, or fewer than 4 vignettes with scores.
    """
    require(
        base.shape == plus.shape == minus.shape
        and base.ndim == 3
        and base.shape[0] == len(labels)
        and base.shape[2] == len(FOUNDATIONS),
        f"the scores have shapes {base.shape}, {plus.shape} and {minus.shape} for {len(labels)} "
        f"labels, all must be (item, paraphrase, {len(FOUNDATIONS)}).",
    )
    scored = np.isfinite(base + plus + minus).all((1, 2))
    items = int(scored.sum())
    require(items >= 4, f"{items} vignettes have scores, at least 4 are needed.")
    base, plus, minus = base[scored], plus[scored], minus[scored]
    intended = np.array([FOUNDATIONS.index(label) for label in labels])[scored]
    prior = base.mean(0, keepdims=True) if calibrated else np.zeros((1, 1, 1))
    chosen = (base - prior).mean(1).argmax(1)
    j, p = informedness(chosen, intended), permutation_p(chosen, intended)
    # `[item, paraphrase, foundation]`: each paraphrase alone, and last their mean.
    up, down = (
        log_softmax(np.concatenate([x, x.mean(1, keepdims=True)], 1), axis=-1)
        for x in (plus - prior, minus - prior)
    )
    profile = up[:, -1] - down[:, -1]
    flat = float(np.ptp(profile.mean(0))) < 1e-12  # no profile, so no correlation
    reliability = 0.0 if flat else split_half(profile)
    agreement: dict[str, list[float]] = {}
    intervals: dict[str, list[tuple[float, float]]] = {}
    each: dict[str, Foundation] = {}
    failed = []
    if not (p < CHANCE and j > 0):
        failed.append(f"informedness is {j:.2f} (permutation p {p:.4f}, must be below {CHANCE:g})")
    if not expected:
        failed.append("the axis expects no foundation to move")
    for name, sign in expected.items():
        k = FOUNDATIONS.index(name)
        pairs = np.stack([up[:, :, k], down[:, :, k]], -1).swapaxes(0, 1)
        contrasts = [contrast(x) for x in pairs]
        bounds = [interval(x, contrast, config) for x in pairs]
        agreement[name], total = contrasts[:-1], contrasts[-1]
        intervals[name], (low, high) = bounds[:-1], bounds[-1]
        # Every paraphrase must have the expected sign, and the interval over all must exclude 0.
        agrees = all(sign * c > 0 for c in (*agreement[name], total, low, high))
        j_k, p_k = informedness(chosen, intended, k), permutation_p(chosen, intended, k)
        valid = p_k < CHANCE and j_k > 0 and agrees
        each[name] = Foundation(j_k, p_k, total, (low, high), sign, valid)
        if not agrees:
            failed.append(
                f"the persona contrast of {name} is "
                f"{', '.join(f'{c:+.2f}' for c in agreement[name])} nats by paraphrase and "
                f"{total:+.2f} ({low:+.2f} to {high:+.2f}) over all, "
                f"must be {'above' if sign > 0 else 'below'} 0"
            )
    if reliability < RELIABLE:
        failed.append(f"split-half reliability is {reliability:.2f}, must be at least {RELIABLE:g}")
    passed = (
        f"informedness {j:.2f} (permutation p {p:.4f}), the persona contrast has the expected sign "
        f"in every paraphrase, split-half {reliability:.2f}."
    )
    reason = f"{'; '.join(failed)}." if failed else passed
    return Validity(
        instrument,
        not failed,
        reason,
        j,
        p,
        reliability,
        agreement,
        intervals,
        each,
        items,
        len(labels) - items,
    )
