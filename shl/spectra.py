"""The singular values and directions of s B A, and angles between subspaces, from the factors.

With B = Q_b R_b and A^T = Q_a R_a, s B A = Q_b (s R_b R_a^T) Q_a^T: the singular value
decomposition of the small core gives that of the product, whose `[d_out, d_in]` is never formed.
In float64, since angles near 0 are differences of numbers near 1.
"""

from dataclasses import dataclass

import torch

from shl.errors import check
from shl.shapes import Down, Float, Tensor, Up

NEGLIGIBLE = 1e-7
"""Singular values below this share of the largest are rounding of the fp32 factors."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """s B A = left diag(values) right, float64: the decomposition of one site's update.

    `left` is `[d_out, k]` (what is written), `right` `[k, d_in]` (what is read), with orthonormal
    columns and rows; `values` `[k]` falls from the largest. Directions without a size (below
    1e-7 of the largest value) are left out, so an update of zero has k = 0. The sign of a pair of
    directions is arbitrary: `left` and `right` may change it together.

    Example:
        >>> import torch
        >>> spectrum(torch.tensor([[0.0, 2.0]]), torch.tensor([[3.0], [4.0]]), 0.5).norm
        5.0
    """

    left: Float[Tensor, "d_out k"]
    values: Float[Tensor, " k"]
    right: Float[Tensor, "k d_in"]

    @property
    def norm(self) -> float:
        """Frobenius norm of s B A, in units of the weights."""
        return float(torch.linalg.vector_norm(self.values))

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the singular values as shares of their sum: k if they are all
        alike, 1 if one of them is all there is, 0 for an update of zero (Roy & Vetterli 2007,
        "The effective rank")."""
        return effective_rank(self.values)


def spectrum(down: Down, up: Up, scale: float = 1.0) -> Spectrum:
    """The singular value decomposition of `scale * up @ down` without allocating that product.

    Args:
        down: A, `[rank, d_in]`.
        up: B, `[d_out, rank]`.
        scale: `lora_alpha / rank`.

    Raises:
        ShlError: factors with numbers that are not finite.

    Example:
        >>> import torch
        >>> a, b = torch.randn(2, 5), torch.randn(7, 2)
        >>> s = spectrum(a, b, 3.0)
        >>> bool(torch.allclose(s.left @ s.values.diag() @ s.right, 3.0 * (b @ a).double()))
        True
    """
    check(
        bool(torch.isfinite(down).all() and torch.isfinite(up).all()),
        "an adapter's factors hold numbers that are not finite.",
    )
    q_up, r_up = torch.linalg.qr(up.detach().cpu().double())
    q_down, r_down = torch.linalg.qr(down.detach().cpu().double().T)
    left, values, right = torch.linalg.svd(scale * (r_up @ r_down.T), full_matrices=False)
    # What two fp32 factors leave beside an exact zero is their rounding.
    keep = values > NEGLIGIBLE * abs(scale) * r_up.norm() * r_down.norm()
    return Spectrum(q_up @ left[:, keep], values[keep], right[keep] @ q_down.T)


def effective_rank(values: Float[Tensor, " k"]) -> float:
    """exp(-sum p log p) with p = values / sum(values): how many of them matter, between 1 and k.

    Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality" (EUSIPCO).
    0 without any positive value.

    Example:
        >>> import torch
        >>> [round(effective_rank(torch.tensor(v)), 3) for v in ([2.0, 2.0], [2.0, 0.0])]
        [2.0, 1.0]
    """
    positive = values[values > 0].double()
    if not len(positive):
        return 0.0
    shares = positive / positive.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


def principal_angles(one: Float[Tensor, "d k"], other: Float[Tensor, "d m"]) -> Float[Tensor, " n"]:
    """Angles in degrees, from the smallest, between the spans of two orthonormal sets of columns.

    Bjorck & Golub 1973 (Math. Comp. 27): their cosines are the singular values of
    `one.T @ other`, min(k, m) of them. Small angles come from the sines instead, whose cosines
    would round to 1.

    Raises:
        ShlError: columns that are not orthonormal.

    Example:
        >>> import torch
        >>> x, y = torch.eye(3)[:, :2], torch.eye(3)[:, 1:]
        >>> principal_angles(x, y)
        tensor([ 0., 90.], dtype=torch.float64)
    """
    one, other = one.double(), other.double()
    for columns in (one, other):
        gap = (columns.T @ columns - torch.eye(columns.shape[1], dtype=torch.float64)).abs()
        check(
            bool((gap <= 1e-6).all()),
            f"the columns are orthonormal to {float(gap.max()) if gap.numel() else 0:.1g} only, "
            "orthonormalise them first.",
        )
    if one.shape[1] < other.shape[1]:
        one, other = other, one
    inner = one.T @ other
    cosines = torch.linalg.svdvals(inner).clamp(max=1)
    sines = torch.linalg.svdvals(other - one @ inner).flip(0).clamp(max=1)
    sines = sines[: len(cosines)]
    angles = torch.where(cosines**2 > 0.5, torch.asin(sines), torch.acos(cosines))
    return torch.rad2deg(angles)


def overlap(angles: Float[Tensor, " n"]) -> float:
    """Mean squared cosine of principal angles (degrees): the share of one span that lies in the
    other.

    Random k-dimensional subspaces of d dimensions have k / d on average; 0 without an angle.

    Example:
        >>> import torch
        >>> round(overlap(torch.tensor([0.0, 90.0])), 6)
        0.5
    """
    return float(torch.cos(torch.deg2rad(angles.double())).square().mean()) if len(angles) else 0.0


def product_cosine(
    one: tuple[Float[Tensor, "r1 d_in"], Float[Tensor, "d_out r1"]],
    other: tuple[Float[Tensor, "r2 d_in"], Float[Tensor, "d_out r2"]],
) -> float:
    """Cosine between B1 A1 and B2 A2 as vectors of their entries, without allocating either.

    <B1 A1, B2 A2> = trace(A1^T B1^T B2 A2) = sum((B1^T B2) * (A1 A2^T)). Turned at random, an
    update has a cosine of mean 0 and mean square 1 / (d_out d_in) to any other. Scales do not
    matter, except for their sign. 0 if either is zero.

    Example:
        >>> import torch
        >>> a, b = torch.randn(2, 5), torch.randn(7, 2)
        >>> round(product_cosine((a, b), (a, -2 * b)), 6)
        -1.0
    """
    (a1, b1), (a2, b2) = (
        (a.detach().cpu().double(), b.detach().cpu().double()) for a, b in (one, other)
    )

    def inner(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return ((b.T @ d) * (a @ c.T)).sum()

    size = (inner(a1, b1, a1, b1) * inner(a2, b2, a2, b2)).clamp(min=0).sqrt()
    return float(inner(a1, b1, a2, b2) / size) if float(size) > 0 else 0.0
