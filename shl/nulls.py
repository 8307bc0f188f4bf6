"""What a cosine to a steering vector is worth: how large it gets by chance.

Residual streams vary along few directions, so two unrelated vectors of d numbers have cosines far
above the 1 / sqrt(d) of isotropic ones. Both nulls keep that shape.
"""

import torch

from shl.errors import check
from shl.seeds import generator_for
from shl.shapes import Direction, Float, Tensor


def random_cosines(
    reference: Direction,
    states: Float[Tensor, "n d_model"],
    *,
    draws: int = 1000,
    seed: int = 0,
) -> Float[Tensor, " draws"]:
    """Cosines to `reference` of normal random directions with the covariance of `states`.

    "Would any direction along which this stream varies look as close?" A draw is sum_i z_i x_i
    with z normal and x the centred rows, whose covariance is that of the rows without forming it.
    It has rank n - 1 at most: take n well above the few directions that matter.

    Args:
        reference: `[d_model]`, what the cosines are to.
        states: `[n, d_model]`, for instance residuals at one token of n prompts.

    Raises:
        ShlError: fewer than two rows, rows that do not differ, or a reference of zero.

    Example:
        >>> import torch
        >>> axes = torch.cat([torch.eye(50), -torch.eye(50)])  # the same in every direction
        >>> cosines = random_cosines(torch.ones(50), axes, draws=2000)
        >>> round(float((cosines**2).mean()), 2)  # 1 / 50
        0.02
    """
    check(len(states) >= 2, f"{len(states)} rows have no covariance, it takes two.")
    states = states.double()
    centred = states - states.mean(0)
    check(bool(centred.any()), "the rows do not differ, so they have no covariance.")
    z = torch.randn(draws, len(states), generator=generator_for(seed, "null"), dtype=torch.float64)
    return _cosines(reference, z @ centred)


def shuffled_cosines(
    reference: Direction,
    differences: Float[Tensor, "n d_model"],
    *,
    draws: int = 1000,
    seed: int = 0,
) -> Float[Tensor, " draws"]:
    """Cosines to `reference` of mean differences whose persona labels are shuffled.

    "Would these contexts give such a vector if the personas meant nothing?" In each draw the two
    personas change places in a random half of the contexts (an odd one is left out), which takes
    the mean difference out exactly. Flips at random would leave a share of it in, and a cosine
    does not see how small that share is.

    Args:
        reference: `[d_model]`, what the cosines are to.
        differences: `[n, d_model]`, positive minus negative persona, one row per context.

    Raises:
        ShlError: fewer than two contexts, differences that are all alike, or a reference of zero.

    Example:
        >>> import torch
        >>> noise = torch.eye(4)[[0, 1, 2, 3]]
        >>> cosines = shuffled_cosines(torch.tensor([1.0, 0, 0, 0]), noise + 100.0, draws=10)
        >>> sorted({round(float(c), 6) for c in cosines})  # four of +-1 each: 1 / sqrt(4)
        [-0.5, 0.5]
    """
    n = len(differences)
    check(n >= 2, f"the labels of {n} contexts cannot be shuffled, it takes two.")
    differences = differences.double()
    centred = differences - differences.mean(0)
    spread = float(torch.linalg.vector_norm(centred) / torch.linalg.vector_norm(differences))
    check(spread > 1e-6, "the differences are all alike, so shuffled labels leave nothing.")
    signs = torch.zeros(draws, n, dtype=torch.float64)
    order = torch.rand(draws, n, generator=generator_for(seed, "shuffle")).argsort(1)
    signs.scatter_(1, order[:, : n // 2], 1.0)
    signs.scatter_(1, order[:, n // 2 : 2 * (n // 2)], -1.0)
    return _cosines(reference, signs @ centred)


def bound(cosines: Float[Tensor, " draws"], confidence: float = 0.95) -> float:
    """The |cosine| that a share `confidence` of the draws stays below.

    Example:
        >>> import torch
        >>> round(bound(torch.linspace(-1, 1, 2001)), 3)
        0.95
    """
    return float(torch.quantile(cosines.abs(), confidence))


def _cosines(reference: Direction, directions: Float[Tensor, "draws d_model"]) -> Tensor:
    reference = reference.double().cpu()
    check(bool(reference.any()), "the reference direction is 0, nothing has a cosine to it.")
    return torch.cosine_similarity(directions, reference[None], dim=1)
