"""What each round's adapter does to the weights, site by site, and how rounds stand to each other.

Everything comes from the factors A and B; no dW is ever formed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from shl.hooks.adapter import Adapter
from shl.utils.errors import require
from shl.utils.shapes import Down, Float, Tensor, Up

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
    require(
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
        require(
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


@dataclass(frozen=True)
class Turn:
    """How one round's dW at a site stands to another round's.

    `cosine` is that of their entries; turned at random it has mean 0 and, for 95 %, a size below
    `chance`. `written` and `read` are the principal angles (degrees, from the smallest) between
    what they write (column spaces) and what they read (row spaces); the overlaps are the angles'
    mean squared cosines, which random subspaces have at `written_chance` and `read_chance` on
    average.
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
    `effective_rank` is Roy & Vetterli's. Turns are None in the first round, and where the other
    round has no such site.
    """

    round: int
    site: str
    norm: float
    singular_values: tuple[float, ...]
    effective_rank: float
    to_first: Turn | None
    to_previous: Turn | None


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
            own = spectra[index][site.name]
            to_first, to_previous = (
                _turn((adapter, own), (adapters[i], spectra[i][site.name]), site.name)
                if index and site.name in spectra[i]
                else None
                for i in (0, index - 1)
            )
            yield UpdateEntry(
                index,
                site.name,
                own.norm,
                tuple(own.values[:top].tolist()),
                own.effective_rank,
                to_first,
                to_previous,
            )


def _turn(one: tuple[Adapter, Spectrum], other: tuple[Adapter, Spectrum], name: str) -> Turn:
    factors = [
        (adapter.down[name], adapter.up[name] * adapter.scale) for adapter, _ in (one, other)
    ]
    a, b = one[1], other[1]
    (d_out, _), (_, d_in) = a.left.shape, a.right.shape
    # The smaller space's share in the larger, of k of d dimensions, is k / d on average.
    larger = max(len(a.values), len(b.values))
    return Turn(
        cosine=product_cosine(factors[0], factors[1]),
        chance=1.96 / (d_out * d_in) ** 0.5,
        written=tuple(principal_angles(a.left, b.left).tolist()),
        read=tuple(principal_angles(a.right.T, b.right.T).tolist()),
        written_chance=larger / d_out,
        read_chance=larger / d_in,
    )
