"""Bootstrap intervals and split-half reliability, on plain arrays."""

from collections.abc import Callable

import numpy as np

from shl.utils.errors import require
from shl.utils.seeds import seed_for


def bootstrap(
    items: np.ndarray,
    statistic: Callable[[np.ndarray], float],
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of `statistic` over resampled rows of `items` (Efron 1979).

    Rows are resampled whole, so that columns of the same item (a model and its base) stay paired.
    `scipy.stats.bootstrap` is slower here, and its standard error fails on infinite resamples.

    Example:
        >>> import numpy as np
        >>> bootstrap(np.ones((5, 1)), lambda x: float(x.mean()))
        (1.0, 1.0)
    """
    require(len(items) > 0, "there are no items to resample.")
    rng = np.random.default_rng(seed_for(seed, "bootstrap"))
    picks = rng.integers(0, len(items), size=(resamples, len(items)))
    values = np.array([statistic(items[pick]) for pick in picks])
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def split_half(items: np.ndarray, *, splits: int = 200, seed: int = 0) -> float:
    """Mean correlation r of the column profiles of random halves of the rows, corrected to full
    length by Spearman-Brown: 2 r / (1 + r).

    Example:
        >>> import numpy as np
        >>> split_half(np.tile([1.0, 2.0, 3.0], (8, 1)))
        1.0
    """
    n = len(items)
    require(n >= 4, f"{n} items cannot be split in halves, at least 4 are needed.")
    rng = np.random.default_rng(seed_for(seed, "split"))
    orders = [rng.permutation(n) for _ in range(splits)]
    halves = [(items[order[: n // 2]].mean(0), items[order[n // 2 :]].mean(0)) for order in orders]
    correlations = [np.corrcoef(a, b)[0, 1] for a, b in halves]
    r = float(np.mean(correlations))
    return float(2 * r / (1 + r)) if r > -1 else -1.0
