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

    `left` (what is written) has orthonormal columns and `right` (what is read) orthonormal rows;
    `values` descend. Singular values below 1e-7 of the largest are left out, so an update of zero
    has k = 0. The sign of each pair of directions is arbitrary.

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
        """exp(-sum p log p) with p = values / sum(values): k if all are equal, 1 if one dominates,
        0 for an update of zero.

        Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality" (EUSIPCO).
        """
        shares = self.values[self.values > 0] / self.values.sum()
        return float(torch.exp(-(shares * shares.log()).sum())) if len(shares) else 0.0


def spectrum(down: Down, up: Up, scale: float = 1.0) -> Spectrum:
    """Singular value decomposition of `scale * up @ down` without allocating that product.

    Args:
        down: A.
        up: B.
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
    finite = bool(torch.isfinite(down).all() and torch.isfinite(up).all())
    require(finite, "the adapter's factors hold numbers that are not finite.")
    q_up, r_up = torch.linalg.qr(up.detach().cpu().double())
    q_down, r_down = torch.linalg.qr(down.detach().cpu().double().T)
    left, values, right = torch.linalg.svd(scale * (r_up @ r_down.T), full_matrices=False)
    # Rounding of the fp32 factors leaves small values where an exact zero is meant.
    keep = values > NEGLIGIBLE * abs(scale) * r_up.norm() * r_down.norm()
    return Spectrum(q_up @ left[:, keep], values[keep], right[keep] @ q_down.T)


def principal_angles(one: Float[Tensor, "d k"], other: Float[Tensor, "d m"]) -> Float[Tensor, " n"]:
    """The min(k, m) angles between the spans of two sets of columns, in degrees, ascending
    (Björck & Golub 1973).

    Example:
        >>> import torch
        >>> x, y = torch.eye(3)[:, :2], torch.eye(3)[:, 1:]
        >>> principal_angles(x, y)
        tensor([ 0., 90.], dtype=torch.float64)
    """
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
    (a1, b1), (a2, b2) = ([x.detach().cpu().double() for x in pair] for pair in (one, other))

    def inner(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return ((b.T @ d) * (a @ c.T)).sum()

    size = (inner(a1, b1, a1, b1) * inner(a2, b2, a2, b2)).clamp(min=0).sqrt()
    return float(inner(a1, b1, a2, b2) / size) if float(size) > 0 else 0.0


@dataclass(frozen=True)
class UpdateComparison:
    """Comparison of one round's dW at a site with another round's.

    `cosine` is that of their entries; for `NULL_COVERAGE` of random rotations its size is below
    `chance`. `written` and `read` are the principal angles (degrees, ascending) between their
    column spaces and between their row spaces; `written_chance` and `read_chance` are the mean
    overlaps of random subspaces.
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

    `norm` (Frobenius) and `singular_values` (descending) are in units of the weights;
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
        {s.name: spectrum(a.down[s.name], a.up[s.name], a.scale) for s in a.sites} for a in adapters
    ]

    def compare(name: str, index: int, other: int) -> UpdateComparison | None:
        if index == 0 or name not in spectra[other]:
            return None
        one, two = spectra[index][name], spectra[other][name]
        pairs = [(a.down[name], a.up[name] * a.scale) for a in (adapters[index], adapters[other])]
        d_out, d_in = len(one.left), one.right.shape[1]
        # The mean share of a random smaller space in a larger one of k of d dimensions is k / d.
        larger = max(len(one.values), len(two.values))
        return UpdateComparison(
            cosine=product_cosine(*pairs),
            # Nearly normal, with standard deviation 1 / sqrt(d_out d_in).
            chance=NormalDist().inv_cdf((1 + NULL_COVERAGE) / 2) / (d_out * d_in) ** 0.5,
            written=tuple(principal_angles(one.left, two.left).tolist()),
            read=tuple(principal_angles(one.right.T, two.right.T).tolist()),
            written_chance=larger / d_out,
            read_chance=larger / d_in,
        )

    for index, round_spectra in enumerate(spectra):
        for name, found in round_spectra.items():
            yield UpdateEntry(
                index,
                name,
                found.norm,
                tuple(found.values[:top].tolist()),
                found.effective_rank,
                compare(name, index, 0),
                compare(name, index, index - 1),
            )
