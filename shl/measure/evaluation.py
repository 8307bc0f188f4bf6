"""What the probe read, as a frozen result: arrays in, trait and coherence out."""

from dataclasses import dataclass

import numpy as np

from shl.config import FOUNDATIONS, EvalConfig
from shl.measure.stats import bootstrap


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What the probe read, per vignette and in sum.

    `log_probs` is `[item, asked, option]`: nats, raw, one slice per stem (or per order);
    `log_p` is `[item, option]`: log-probabilities renormalised over the options after
    calibration; `mass` is the probability of any valid answer, per `asked`.

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
        """`[item, option]`, nats: calibrated, averaged over `asked`, renormalised."""
        return log_softmax((self.log_probs - self.prior).mean(1))

    @property
    def log_p_each(self) -> np.ndarray:
        """`[item, asked, option]`, nats: the same for each stem or order alone."""
        return log_softmax(self.log_probs - self.prior)

    @property
    def nats(self) -> dict[str, float]:
        """Log of the mean probability over all vignettes, per foundation."""
        return dict(zip(FOUNDATIONS, map(float, nats_of(self.log_p)), strict=True))

    @property
    def mass(self) -> np.ndarray:
        """`[asked]`: mean probability of any valid answer."""
        return np.exp(nats_of(logsumexp(self.log_probs)[:, :, 0]))

    @property
    def coherence(self) -> float:
        """Valid-answer mass relative to base, geometric mean over stems or orders."""
        masses = nats_of(logsumexp(self.log_probs)[:, :, 0])
        return float(np.exp(np.mean(masses - np.log(self.base_mass))))

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
        """Foundations that this reading names in at most twice chance (2/7) of their own
        vignettes: their own nats mean little."""
        counts = self.confusion
        recall = counts.diagonal() / np.maximum(counts.sum(1), 1)
        return tuple(
            name
            for name, share, n in zip(FOUNDATIONS, recall, counts.sum(1), strict=True)
            if n and share <= 2 / len(FOUNDATIONS)
        )

    @property
    def intended(self) -> np.ndarray:
        """`[item]`: index of the foundation that each vignette was written for."""
        return np.array([FOUNDATIONS.index(label) for label in self.labels])

    def shift(self, base: "Evaluation") -> dict[str, float]:
        """Difference of `nats` to another reading of the same vignettes."""
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
        masses = logsumexp(self.log_probs)[:, :, 0]
        return bootstrap(
            masses,
            lambda x: float(np.exp(np.mean(nats_of(x) - np.log(self.base_mass)))),
            resamples=config.bootstrap,
            confidence=config.confidence,
        )


def nats_of(log_p: np.ndarray) -> np.ndarray:
    """Log of the mean probability over items: `[item, ...]` to `[...]`.

    Example:
        >>> import numpy as np
        >>> nats_of(np.log([[0.25, 0.75], [0.75, 0.25]])).round(3)
        array([-0.693, -0.693])
    """
    # Without the largest taken out, what a broken model gives would underflow to log 0.
    top = log_p.max(0)
    return top + np.log(np.exp(log_p - top).mean(0))


def logsumexp(x: np.ndarray) -> np.ndarray:
    """Log of the sum of exponentials over the last axis, which stays with size 1."""
    top = x.max(-1, keepdims=True)
    return top + np.log(np.exp(x - top).sum(-1, keepdims=True))


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Log-probabilities over the last axis."""
    return x - logsumexp(x)


def _centred(log_p: np.ndarray) -> np.ndarray:
    return log_p - log_p.mean(-1, keepdims=True)
