"""The low-rank adapter: factors per site, onto a model and back from a file."""

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor
from transformer_lens import HookedTransformer

from shl.adapter_meta import KINDS, read_sites, shared, told_sites
from shl.errors import check
from shl.files import check_told, identity, read_safetensors, write_safetensors
from shl.fingerprint import check_made_for
from shl.low_rank import LowRank
from shl.scope import Positions, Scope
from shl.shapes import Bool, Down, Float, Up
from shl.sites import Site, sites_of

FORMAT = "shl-adapter-3"


@dataclass(frozen=True, eq=False)
class Adapter:
    """Factors A `[rank, d_in]` and B `[d_out, rank]` per site, by site name.

    `scale` is s = lora_alpha / rank. `model_name`, `weights` (`shl.fingerprint.weights_hash`) and
    `dtype` tell on which base it was made, `axis` and `round` where in a loop it was trained;
    each may be None where it is not known.

    Raises:
        ShlError: factors of other sites than `sites`, or of other shapes.

    Example:
        >>> import torch
        >>> site = Site("q", 0, 3, 2)
        >>> a, b = torch.ones(1, 3), torch.ones(2, 1)
        >>> Adapter((site,), {site.name: a}, {site.name: b}, 0.5, "tiny").norms()
        {'blocks.0.q': 1.2247...}
    """

    sites: tuple[Site, ...]
    down: dict[str, Down]
    up: dict[str, Up]
    scale: float
    model_name: str
    round: int | None = None
    weights: str | None = None
    dtype: str | None = None
    axis: str | None = None

    def __post_init__(self) -> None:
        names = [site.name for site in self.sites]
        for kind, factors in (("A", self.down), ("B", self.up)):
            check(
                sorted(factors) == sorted(names),
                f"an adapter's {kind} has sites {sorted(factors)}, it must have {sorted(names)}.",
            )
        for site in self.sites:
            a, b = tuple(self.down[site.name].shape), tuple(self.up[site.name].shape)
            check(
                (a[1:], b[:1], a[:1]) == ((site.d_in,), (site.d_out,), b[1:]),
                f"the factors of {site.name} have shapes {a} and {b}, they must be "
                f"(rank, {site.d_in}) and ({site.d_out}, rank).",
            )

    def parameters(self) -> list[Tensor]:
        """A and B of every site, in order."""
        return [f[site.name] for site in self.sites for f in (self.down, self.up)]

    def attach(
        self,
        model: HookedTransformer,
        *,
        dose: float | Float[Tensor, " batch"] = 1.0,
        mask: Bool[Tensor, "batch pos"] | None = None,
        positions: Positions | None = None,
    ) -> LowRank:
        """Put the adapter on a model, as a context manager with `.remove()`;
        `model.reset_hooks()` does not take it off.

        Args:
            dose: times the update is added; a number, or one per row of the batch.
            mask: True where the adapter acts, by row and absolute position in the row's own
                tokens; it does not act beyond the mask's width.
            positions: which absolute positions it acts on, in every row.

        Raises:
            ShlError: the model has other sites than those the adapter was made for, or a dose,
                mask or positions out of range.
        """
        check_fits(model, self)
        scope = Scope(model, dose, mask=mask, positions=positions)
        return LowRank(model, self.sites, self.down, self.up, self.scale, scope)

    def frozen(self) -> "Adapter":
        """A copy that no optimiser can reach."""
        return replace(
            self,
            down={key: a.detach().clone() for key, a in self.down.items()},
            up={key: b.detach().clone() for key, b in self.up.items()},
        )

    def norms(self) -> dict[str, float]:
        """Frobenius norm of s B A per site, from the factors."""
        out = {}
        for site in self.sites:
            a, b = self.down[site.name].detach(), self.up[site.name].detach()
            # |BA|^2 = trace(B^T B A A^T)
            square = ((b.T @ b) * (a @ a.T)).sum().clamp(min=0)
            out[site.name] = float(square.sqrt()) * abs(self.scale)
        return out

    @property
    def ranks(self) -> dict[str, int]:
        """Rank per site; those of a stack may differ."""
        return {site.name: len(self.down[site.name]) for site in self.sites}

    @property
    def rank(self) -> int | None:
        """The rank of every site, or None where they differ."""
        return shared(self.ranks.values())

    def identity(self) -> str:
        """What `save` writes as identity: SHA-256 of numbers and metadata, no path, no time."""
        tensors, told = self._content()
        return identity(tensors, {"format": FORMAT, **told})

    def save(self, path: str | Path) -> None:
        """Write safetensors; `shl.adapter_meta.KINDS` lists what its metadata says."""
        tensors, told = self._content()
        check_told(path, told, KINDS)
        write_safetensors(path, FORMAT, tensors, told)

    def _content(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        tensors = {f"{key}.A": a for key, a in self.down.items()}
        tensors |= {f"{key}.B": b for key, b in self.up.items()}
        told = {
            "model": self.model_name,
            "weights": self.weights,
            "dtype": self.dtype,
            "axis": self.axis,
            "round": self.round,
        }
        return tensors, told | told_sites(self.sites, self.ranks, float(self.scale))

    @classmethod
    def read(cls, path: str | Path) -> "Adapter":
        """Read what `save` wrote, without a model; the tensors are on the CPU.

        Raises:
            ShlError: a missing, damaged or changed file, or metadata that is not what it must
                be or does not match the tensors.
        """
        meta, tensors = read_safetensors(path, FORMAT, KINDS)
        sites = tuple(read_sites(path, meta, tensors))
        return cls(
            sites,
            {site.name: tensors[f"{site.name}.A"] for site in sites},
            {site.name: tensors[f"{site.name}.B"] for site in sites},
            meta["scale"],
            meta["model"],
            meta["round"],
            meta["weights"],
            meta["dtype"],
            meta["axis"],
        )

    @classmethod
    def load(
        cls, path: str | Path, model: HookedTransformer, *, any_weights: bool = False
    ) -> "Adapter":
        """Read what `save` wrote and check that it was made for `model`; nothing is skipped.

        Args:
            any_weights: take an adapter that was made on other weights (a fine-tune, another
                dtype) of a model of this name and these widths.

        Raises:
            ShlError: what `read` raises, or an adapter of another model, other weights, another
                dtype or other sites; the sentence names the first difference.

        Example:
            >>> import tempfile
            >>> from shl.config import HealConfig
            >>> from shl.lora import fresh_adapter
            >>> from shl.tiny import tiny_gemma
            >>> path = tempfile.mkdtemp() + "/adapter.safetensors"
            >>> fresh_adapter(tiny_gemma(), HealConfig(rank=2)).save(path)
            >>> Adapter.load(path, tiny_gemma()).rank
            2
            >>> Adapter.load(path, tiny_gemma(seed=1))
            Traceback (most recent call last):
            shl.errors.ShlError: ... was made on weights of tiny-gemma with the hash ...
        """
        own = cls.read(path)
        check_made_for(
            model, str(path), own.model_name, own.weights, own.dtype, any_weights=any_weights
        )
        check_fits(model, own)
        device = model.W_U.device
        down = {key: a.to(device) for key, a in own.down.items()}
        return replace(own, down=down, up={key: b.to(device) for key, b in own.up.items()})


def check_fits(model: HookedTransformer, adapter: Adapter) -> None:
    """Raise unless every site of the adapter exists on the model with the same widths."""
    for site in adapter.sites:
        (own,) = sites_of(model, [site.kind], [site.layer])
        check(
            own == site,
            f"the adapter's {site.name} maps {site.d_in} to {site.d_out} features, on "
            f"{model.cfg.model_name} it maps {own.d_in} to {own.d_out}.",
        )
