"""The result of an evaluation on the vignettes: trait and coherence from log-probabilities."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax, logsumexp

from shl.config import FOUNDATIONS, EvalConfig
from shl.measure.stats import bootstrap


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Scores of a model on the vignettes, and the trait and coherence that follow from them.

    `log_probs` is `[item, paraphrase, option]`: raw, in nats, one slice per stem (or per order);
    `log_p` is `[item, option]`: log-probabilities renormalised over the options after
    calibration; `mass` is the probability of any valid answer, per paraphrase.

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
        return dict(zip(FOUNDATIONS, map(float, nats_of(self.log_p)), strict=True))

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
        """Counts `[intended, chosen]` in the order of the foundations."""
        table = np.zeros((len(FOUNDATIONS),) * 2, dtype=int)
        np.add.at(table, (self.intended, self.log_p.argmax(1)), 1)
        return table

    @property
    def noise(self) -> tuple[str, ...]:
        """Foundations chosen in at most twice chance (2/7) of the vignettes written for them:
        their nats mean little."""
        counts = self.confusion
        return tuple(
            name
            for name, hits, n in zip(FOUNDATIONS, counts.diagonal(), counts.sum(1), strict=True)
            if n and hits / n <= 2 / len(FOUNDATIONS)
        )

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
        config = config or EvalConfig()
        k = FOUNDATIONS.index(foundation)
        pairs = np.stack([self.log_p[:, k], base.log_p[:, k]], 1)
        return bootstrap(
            pairs,
            lambda x: float(-np.diff(nats_of(x))[0]),
            resamples=config.bootstrap,
            confidence=config.confidence,
        )

    def centred_shift(self, base: "Evaluation") -> dict[str, float]:
        """Mean per-vignette shift of the log-ratio to the options' mean: each vignette counts
        alike, however small its probability."""
        moved = _centred(self.log_p) - _centred(base.log_p)
        return dict(zip(FOUNDATIONS, map(float, moved.mean(0)), strict=True))

    def coherence_interval(self, config: EvalConfig | None = None) -> tuple[float, float]:
        """Bootstrap interval of `coherence` over vignettes, base held fixed."""
        config = config or EvalConfig()
        return bootstrap(
            log_mass(self.log_probs),
            self._coherence,
            resamples=config.bootstrap,
            confidence=config.confidence,
        )

    def _coherence(self, log_masses: np.ndarray) -> float:
        return float(np.exp(np.mean(nats_of(log_masses) - np.log(self.base_mass))))


def nats_of(log_p: np.ndarray) -> np.ndarray:
    """Log of the mean probability over items: `[item, ...]` to `[...]`.

    Example:
        >>> import numpy as np
        >>> nats_of(np.log([[0.25, 0.75], [0.75, 0.25]])).round(3)
        array([-0.693, -0.693])
    """
    # By hand, since a bootstrap calls it thousands of times and scipy's logsumexp is 20 times as
    # slow on arrays of this size; without the largest taken out it would underflow to log 0.
    top = log_p.max(0)
    return top + np.log(np.exp(log_p - top).mean(0))


def log_mass(log_probs: np.ndarray) -> np.ndarray:
    """Log probability of any valid answer: `[..., option]` to `[...]`."""
    return logsumexp(log_probs, axis=-1)


def on_axis(shift: np.ndarray, expected: Mapping[str, int]) -> np.ndarray:
    """Mean shift of an axis's foundations in the expected direction: `[..., 7]` to `[...]`, nats.

    Example:
        >>> import numpy as np
        >>> float(on_axis(np.array([0.5, 0, 0, -0.3, 0, 0, 0]), {"care": 1, "authority": -1}))
        0.4
    """
    return np.asarray(shift @ [expected.get(name, 0) for name in FOUNDATIONS] / len(expected))


def _centred(log_p: np.ndarray) -> np.ndarray:
    return log_p - log_p.mean(-1, keepdims=True)
