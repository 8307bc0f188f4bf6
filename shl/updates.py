"""What each round's adapter does to the weights, site by site, and how rounds stand to each other.

Everything comes from the factors A and B; no dW is ever formed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from shl.adapter import Adapter
from shl.spectra import Spectrum, overlap, principal_angles, product_cosine, spectrum


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
        >>> from shl.lora import fresh_adapter
        >>> from shl.tiny import tiny_gemma
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
