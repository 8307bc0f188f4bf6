"""Spectra of each round's weight updates per site, and cosines and angles between rounds.

Everything is computed from the factors A and B; dW itself is never allocated.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from scipy.linalg import subspace_angles

from shl.hooks.adapter import Adapter
from shl.utils.errors import require
from shl.utils.shapes import Down, Float, Tensor, Up

NEGLIGIBLE = 1e-7
"""Singular values below this share of the largest are rounding of the fp32 factors."""
NULL_COVERAGE = 0.95
"""Share of a null distribution of cosines that lies below the bound given for it."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """s B A = left diag(values) right, float64: the decomposition of one site's update.

    `left` is `[d_out, k]` (what is written), `right` `[k, d_in]` (what is read), with orthonormal
    columns and rows; `values` `[k]` descend. Singular values below 1e-7 of the largest are left
    out, so an update of zero has k = 0. The sign of each pair of directions is arbitrary.

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
        """Effective rank (Roy & Vetterli 2007): k if all singular values are equal, 1 if one
        dominates, 0 for an update of zero."""
        return effective_rank(self.values)


def spectrum(down: Down, up: Up, scale: float = 1.0) -> Spectrum:
    """Singular value decomposition of `scale * up @ down` without allocating that product.

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
    require(
        bool(torch.isfinite(down).all() and torch.isfinite(up).all()),
        "the adapter's factors hold numbers that are not finite.",
    )
    q_up, r_up = torch.linalg.qr(up.detach().cpu().double())
    q_down, r_down = torch.linalg.qr(down.detach().cpu().double().T)
    left, values, right = torch.linalg.svd(scale * (r_up @ r_down.T), full_matrices=False)
    # Rounding of the fp32 factors leaves small values where an exact zero is meant.
    keep = values > NEGLIGIBLE * abs(scale) * r_up.norm() * r_down.norm()
    return Spectrum(q_up @ left[:, keep], values[keep], right[keep] @ q_down.T)


def effective_rank(values: Float[Tensor, " k"]) -> float:
    """exp(-sum p log p) with p = values / sum(values), between 1 and k; 0 without a positive value.

    Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality" (EUSIPCO).

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

    Computed by `scipy.linalg.subspace_angles`; there are min(k, m) of them.

    Raises:
        ShlError: columns that are not orthonormal.

    Example:
        >>> import torch
        >>> x, y = torch.eye(3)[:, :2], torch.eye(3)[:, 1:]
        >>> principal_angles(x, y)
        tensor([ 0., 90.], dtype=torch.float64)
    """
    for columns in (one.double(), other.double()):
        gap = (columns.T @ columns - torch.eye(columns.shape[1], dtype=torch.float64)).abs()
        require(
            bool((gap <= 1e-6).all()),
            f"the columns are orthonormal to {float(gap.max()) if gap.numel() else 0:.1g}, they "
            "must be to 1e-6.",
        )
    angles = subspace_angles(one.double().numpy(), other.double().numpy())
    return torch.from_numpy(np.rad2deg(angles[::-1]))


def overlap(angles: Float[Tensor, " n"]) -> float:
    """Mean squared cosine of principal angles (degrees): the share of one span inside the other.

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
    """Cosine between the flattened B1 A1 and B2 A2, without allocating either; 0 if one is zero.

    <B1 A1, B2 A2> = trace(A1^T B1^T B2 A2) = sum((B1^T B2) * (A1 A2^T)). Randomly rotated updates
    have a cosine of mean 0 and mean square 1 / (d_out d_in).

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


@dataclass(frozen=True)
class UpdateComparison:
    """Comparison of one round's dW at a site with another round's.

    `cosine` is that of their entries; for `NULL_COVERAGE` of random rotations its size is below
    `chance`. `written` and `read` are the principal angles (degrees, from the smallest) between
    their column spaces and between their row spaces; the overlaps are the angles' mean squared
    cosines, whose means for random subspaces are `written_chance` and `read_chance`.
    """

    cosine: float
    chance: float
    written: tuple[float, ...]
    read: tuple[float, ...]
    written_chance: float
    read_chance: float

    @property
    def written_overlap(self) -> float:
        """Share of the smaller column space that lies in the other, 0 to 1."""
        return overlap(torch.tensor(self.written))

    @property
    def read_overlap(self) -> float:
        """Share of the smaller row space that lies in the other, 0 to 1."""
        return overlap(torch.tensor(self.read))


@dataclass(frozen=True)
class UpdateEntry:
    """One site of one round's update dW = s B A, from its factors.

    `norm` (Frobenius) and `singular_values` (the largest first) are in units of the weights;
    `effective_rank` is Roy & Vetterli's. Comparisons are None in the first round, and where the
    other round has no such site.
    """

    round: int
    site: str
    norm: float
    singular_values: tuple[float, ...]
    effective_rank: float
    to_first: UpdateComparison | None
    to_previous: UpdateComparison | None


def update_entries(adapters: Sequence[Adapter], top: int = 8) -> Iterator[UpdateEntry]:
    """One entry per round and site.

    Args:
        adapters: one per round, in order.
        top: singular values kept.

    Example:
        >>> from shl.config import HealConfig
        >>> from shl.hooks.adapter import fresh_adapter
        >>> from shl.models.tiny import tiny_gemma
        >>> fresh = fresh_adapter(tiny_gemma(), HealConfig(rank=2, sites=("q",), layers=(0,)))
        >>> [(e.round, e.site, e.norm) for e in update_entries([fresh])]
        [(0, 'blocks.0.q', 0.0)]
    """
    spectra = [
        {
            site.name: spectrum(adapter.down[site.name], adapter.up[site.name], adapter.scale)
            for site in adapter.sites
        }
        for adapter in adapters
    ]
    for index, adapter in enumerate(adapters):
        for site in adapter.sites:
            found = spectra[index][site.name]
            to_first, to_previous = (
                _compare((adapter, found), (adapters[i], spectra[i][site.name]), site.name)
                if index and site.name in spectra[i]
                else None
                for i in (0, index - 1)
            )
            yield UpdateEntry(
                index,
                site.name,
                found.norm,
                tuple(found.values[:top].tolist()),
                found.effective_rank,
                to_first,
                to_previous,
            )


def _compare(
    one: tuple[Adapter, Spectrum], other: tuple[Adapter, Spectrum], name: str
) -> UpdateComparison:
    factors = [
        (adapter.down[name], adapter.up[name] * adapter.scale) for adapter, _ in (one, other)
    ]
    a, b = one[1], other[1]
    (d_out, _), (_, d_in) = a.left.shape, a.right.shape
    # The share of a random smaller space in a larger one of k of d dimensions is k / d on average.
    larger = max(len(a.values), len(b.values))
    return UpdateComparison(
        cosine=product_cosine(factors[0], factors[1]),
        # Nearly normal, with standard deviation 1 / sqrt(d_out d_in).
        chance=NormalDist().inv_cdf((1 + NULL_COVERAGE) / 2) / (d_out * d_in) ** 0.5,
        written=tuple(principal_angles(a.left, b.left).tolist()),
        read=tuple(principal_angles(a.right.T, b.right.T).tolist()),
        written_chance=larger / d_out,
        read_chance=larger / d_in,
    )
