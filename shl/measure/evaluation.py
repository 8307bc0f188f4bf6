"""The result of an evaluation on the vignettes: trait and coherence from log-probabilities."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax, logsumexp

from shl.config import FOUNDATIONS, EvalConfig
from shl.measure.stats import bootstrap
from shl.utils.errors import require


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Scores of a model on the vignettes, and the trait and coherence that follow from them.

    `log_probs` is `[item, paraphrase, option]`, raw, in nats; a paraphrase is a stem or an order.
    `prior` is subtracted from it; `base_mass` is the `mass` of base.

    Example:
        >>> import numpy as np
        >>> scores = np.zeros((2, 1, 7))
        >>> result = Evaluation("digits", ("care", "social"), scores, 0 * scores, np.ones(1))
        >>> round(result.nats["care"], 3)
        -1.946
    """

    style: str
    labels: tuple[str, ...]
    log_probs: np.ndarray
    prior: np.ndarray
    base_mass: np.ndarray

    @property
    def log_p(self) -> np.ndarray:
        """`[item, option]`, nats: calibrated, averaged over paraphrases, renormalised."""
        return log_softmax((self.log_probs - self.prior).mean(1), axis=-1)

    @property
    def log_p_each(self) -> np.ndarray:
        """`[item, paraphrase, option]`, nats: the same for each paraphrase alone."""
        return log_softmax(self.log_probs - self.prior, axis=-1)

    @property
    def nats(self) -> dict[str, float]:
        """Log of the mean probability over all vignettes, per foundation."""
        return by_foundation(nats_of(self.log_p))

    @property
    def mass(self) -> np.ndarray:
        """`[paraphrase]`: mean probability of any valid answer."""
        return np.exp(nats_of(log_mass(self.log_probs)))

    @property
    def coherence(self) -> float:
        """Valid-answer mass relative to base, geometric mean over paraphrases."""
        return self._coherence(log_mass(self.log_probs))

    @property
    def accuracy(self) -> float:
        """Share of vignettes whose most probable option is the intended foundation."""
        return float((self.log_p.argmax(1) == self.intended).mean())

    @property
    def confusion(self) -> np.ndarray:
        """Counts `[intended, chosen]`."""
        table = np.zeros((len(FOUNDATIONS),) * 2, dtype=int)
        np.add.at(table, (self.intended, self.log_p.argmax(1)), 1)
        return table

    @property
    def noise(self) -> tuple[str, ...]:
        """Foundations whose nats mean little: chosen in at most twice chance (2/7) of the vignettes
        written for them."""
        rows = zip(FOUNDATIONS, self.confusion.diagonal(), self.confusion.sum(1), strict=True)
        return tuple(name for name, hits, n in rows if n and hits / n <= 2 / len(FOUNDATIONS))

    @property
    def intended(self) -> np.ndarray:
        """`[item]`: index of the foundation that each vignette was written for."""
        return np.array([FOUNDATIONS.index(label) for label in self.labels])

    def shift(self, base: "Evaluation") -> dict[str, float]:
        """Difference of `nats` to another evaluation of the same vignettes."""
        return {name: value - base.nats[name] for name, value in self.nats.items()}

    def shift_interval(
        self, base: "Evaluation", foundation: str, config: EvalConfig | None = None
    ) -> tuple[float, float]:
        """Bootstrap interval of the shift, paired by vignette."""
        k = FOUNDATIONS.index(foundation)
        pairs = np.stack([self.log_p[:, k], base.log_p[:, k]], 1)
        return interval(pairs, contrast, config)

    def centred_shift(self, base: "Evaluation") -> dict[str, float]:
        """Mean per-vignette shift of the log-ratio to the options' mean: each vignette has the same
        weight, however small its probability."""
        own, others = (x - x.mean(-1, keepdims=True) for x in (self.log_p, base.log_p))
        return by_foundation((own - others).mean(0))

    def coherence_interval(self, config: EvalConfig | None = None) -> tuple[float, float]:
        """Bootstrap interval of `coherence` over vignettes, base held fixed."""
        return interval(log_mass(self.log_probs), self._coherence, config)

    def _coherence(self, log_masses: np.ndarray) -> float:
        return float(np.exp(np.mean(nats_of(log_masses) - np.log(self.base_mass))))


def nats_of(log_p: np.ndarray) -> np.ndarray:
    """Log of the mean probability over items: `[item, ...]` to `[...]`.

    Example:
        >>> import numpy as np
        >>> nats_of(np.log([[0.25, 0.75], [0.75, 0.25]])).round(3)
        array([-0.693, -0.693])
    """
    # A bootstrap calls this thousands of times, and scipy's logsumexp is 20 times as slow on arrays
    # of this size. Subtracting the largest value prevents underflow to log 0.
    top = log_p.max(0)
    return top + np.log(np.exp(log_p - top).mean(0))


def by_foundation(values: np.ndarray) -> dict[str, float]:
    """`[7]` values, keyed by foundation."""
    return dict(zip(FOUNDATIONS, map(float, values), strict=True))


def contrast(pairs: np.ndarray) -> float:
    """Difference of `nats_of` between the first and the second column of `[item, 2]`."""
    return float(-np.diff(nats_of(pairs))[0])


def interval(
    items: np.ndarray, statistic: Callable[[np.ndarray], float], config: EvalConfig | None = None
) -> tuple[float, float]:
    """Bootstrap interval of a statistic over items, with the settings of `config`."""
    config = config or EvalConfig()
    return bootstrap(items, statistic, resamples=config.bootstrap, confidence=config.confidence)


def log_mass(log_probs: np.ndarray) -> np.ndarray:
    """Log probability of any valid answer: `[..., option]` to `[...]`."""
    return logsumexp(log_probs, axis=-1)


def on_axis(shift: np.ndarray, expected: Mapping[str, int]) -> np.ndarray:
    """Mean shift of an axis's foundations in the expected direction: `[..., 7]` to `[...]`, nats.

    Raises:
        ShlError: no foundation is expected to move.

    Example:
        >>> import numpy as np
        >>> float(on_axis(np.array([0.5, 0, 0, -0.3, 0, 0, 0]), {"care": 1, "authority": -1}))
        0.4
    """
    require(len(expected) > 0, "the axis expects no foundation to move, it has no shift on them.")
    return np.asarray(shift @ [expected.get(name, 0) for name in FOUNDATIONS] / len(expected))
