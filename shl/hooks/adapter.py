"""Low-rank adapters: factors per site, initialisation, files, and attachment to a model."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from shl.config import SITE_KINDS, HealConfig
from shl.hooks.fingerprint import check_made_for, dtype_of, name_of, weights_hash
from shl.hooks.lora import LoRA
from shl.hooks.positions import Positions, Scope
from shl.hooks.sites import Site, band, sites_of
from shl.utils.errors import require
from shl.utils.files import (
    MADE_ON,
    NONE,
    Schema,
    identity,
    read_safetensors,
    require_metadata,
    write_safetensors,
)
from shl.utils.seeds import generator_for
from shl.utils.shapes import Bool, Down, Float, Up

SCHEMA: Schema = {
    **MADE_ON,
    "axis": (str, NONE),
    "scale": (float,),
    "rank": (int, NONE),
    "alpha": (float, NONE),
    "sites": (list,),
}
"""The metadata of format `shl-adapter-3`, in addition to `format` and `identity`.

`scale` is s = alpha / rank; `rank` and `alpha` are null if sites differ in rank; a site is
`[kind, layer, d_in, d_out, rank, hook of the input, hook of the output]`."""


def site_metadata(sites: Sequence[Site], ranks: Mapping[str, int], scale: float) -> dict[str, Any]:
    """The file metadata `scale`, `rank`, `alpha` and `sites`."""
    rank = common_value(ranks.values())
    rows = [[s.kind, s.layer, s.d_in, s.d_out, ranks[s.name], *s.hooks] for s in sites]
    alpha = None if rank is None else scale * rank
    return {"scale": scale, "rank": rank, "alpha": alpha, "sites": rows}


def common_value(values: Iterable[Any]) -> Any:
    """The common value of all `values`, or None if they differ.

    Example:
        >>> common_value([8, 8]), common_value([8, 4])
        (8, None)
    """
    first, *others = values
    return first if all(value == first for value in others) else None


def read_sites(what: object, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[Site]:
    """The sites in a file's metadata, checked against its tensors.

    Raises:
        ShlError: a site is invalid or repeated, has other hooks or another rank than its tensors,
            or the tensors are not those of the sites.
    """
    sites = [_site(what, row, tensors) for row in meta["sites"]]
    require(len(sites) > 0, f"{what} names no site.")
    names = [site.name for site in sites]
    require(len(set(names)) == len(names), f"{what} names a site twice.")
    expected = {f"{name}.{factor}" for name in names for factor in "AB"}
    require(
        set(tensors) == expected,
        f"the tensors and the site table of {what} differ at "
        f"{sorted(set(tensors) ^ expected)[:3]}.",
    )
    ranks = {name: len(tensors[f"{name}.A"]) for name in names}
    for key, value in site_metadata(sites, ranks, meta["scale"]).items():
        require(
            meta[key] == value,
            f"{what} has {key} = {short(meta[key])}, its tensors give {short(value)}.",
        )
    return sites


def _site(what: object, row: object, tensors: Mapping[str, Tensor]) -> Site:
    fits = isinstance(row, list) and [type(x) for x in row] == [str, *[int] * 4, str, str]
    require(fits, f"{what} has the site {short(row)}, it must be a list like {EXAMPLE}.")
    assert isinstance(row, list)
    kind, layer, d_in, d_out, rank, *hooks = row
    require(kind in SITE_KINDS, f"{what} has a site {kind!r}, the sites are {SITE_KINDS}.")
    require(
        0 <= layer < 2**31 and min(d_in, d_out, rank) >= 1,
        f"{what} has the site {short(row)}, its layer must be 0 or more and its widths and rank "
        "1 or more.",
    )
    site = Site(kind, layer, d_in, d_out)
    require(
        (*hooks,) == site.hooks,
        f"{what} has the hooks {short(hooks)} for {site.name}, they must be {site.hooks}.",
    )
    for factor, shape in (("A", (rank, d_in)), ("B", (d_out, rank))):
        x = tensors.get(f"{site.name}.{factor}")
        require(
            x is None or tuple(x.shape) == shape,
            f"{factor} of {site.name} in {what} has shape {x is not None and tuple(x.shape)}, by "
            f"the site table it must be {shape}.",
        )
    return site


EXAMPLE = short(site_metadata([Site("q", 3, 640, 1024)], {"blocks.3.q": 16}, 1.0)["sites"][0])


FORMAT = "shl-adapter-3"


@dataclass(frozen=True, eq=False)
class Adapter:
    """Factors A `[rank, d_in]` and B `[d_out, rank]` per site, by site name.

    `scale` is s = lora_alpha / rank. `model_name`, `weights` (its `weights_hash`) and `dtype`
    identify the base model, `axis` and `round` the training run; None if unknown.

    Raises:
        ShlError: the factors do not match `sites` in name or shape.

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
            require(
                sorted(factors) == sorted(names),
                f"an adapter's {kind} has sites {sorted(factors)}, it must have {sorted(names)}.",
            )
        for site in self.sites:
            a, b = tuple(self.down[site.name].shape), tuple(self.up[site.name].shape)
            require(
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
    ) -> LoRA:
        """Add the adapter to a model; returns a context manager with `.remove()`.

        `model.reset_hooks()` does not remove it.

        Args:
            dose: factor of the update; a number, or one per row of the batch.
            mask: True where the adapter acts, by row and absolute position without padding; it does
                not act beyond the mask's width.
            positions: absolute positions on which it acts, in every row.

        Raises:
            ShlError: the model's sites differ from the adapter's, or dose, mask or positions are
                out of range.
        """
        check_fits(model, self)
        scope = Scope(model, dose, mask=mask, positions=positions)
        return LoRA(model, self.sites, self.down, self.up, self.scale, scope)

    def frozen(self) -> "Adapter":
        """A detached copy that does not require gradients."""
        return replace(
            self,
            down={key: a.detach().clone() for key, a in self.down.items()},
            up={key: b.detach().clone() for key, b in self.up.items()},
        )

    def norms(self) -> dict[str, float]:
        """Frobenius norm of s B A per site, computed from the factors."""
        out = {}
        for site in self.sites:
            a, b = self.down[site.name].detach(), self.up[site.name].detach()
            # |BA|^2 = trace(B^T B A A^T)
            square = ((b.T @ b) * (a @ a.T)).sum().clamp(min=0)
            out[site.name] = float(square.sqrt()) * abs(self.scale)
        return out

    @property
    def ranks(self) -> dict[str, int]:
        """Rank per site; the ranks of a stack may differ."""
        return {site.name: len(self.down[site.name]) for site in self.sites}

    @property
    def rank(self) -> int | None:
        """The common rank of all sites, or None if they differ."""
        return common_value(self.ranks.values())

    def identity(self) -> str:
        """The checksum that `save` writes: SHA-256 of tensors and metadata."""
        tensors, metadata = self._content()
        return identity(tensors, {"format": FORMAT, **metadata})

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with the metadata of `shl.hooks.adapter.SCHEMA`."""
        tensors, metadata = self._content()
        require_metadata(path, metadata, SCHEMA)
        write_safetensors(path, FORMAT, tensors, metadata)

    def _content(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        tensors = {f"{key}.A": a for key, a in self.down.items()}
        tensors |= {f"{key}.B": b for key, b in self.up.items()}
        metadata = {
            "model": self.model_name,
            "weights": self.weights,
            "dtype": self.dtype,
            "axis": self.axis,
            "round": self.round,
        }
        return tensors, metadata | site_metadata(self.sites, self.ranks, float(self.scale))

    @classmethod
    def read(cls, path: str | Path) -> "Adapter":
        """Read a file written by `save`, without a model; the tensors are on the CPU.

        Raises:
            ShlError: the file is missing, damaged or modified, or its metadata is invalid or does
                not match the tensors.
        """
        meta, tensors = read_safetensors(path, FORMAT, SCHEMA)
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
        """Read a file written by `save` and check that it was made for `model`.

        Args:
            any_weights: accept an adapter made on other weights (a fine-tune, another dtype) of a
                model with the same name and widths.

        Raises:
            ShlError: as in `read`, or the adapter was made for another model, other weights,
                another dtype or other sites; the message names the first difference.

        Example:
            >>> import tempfile
            >>> from shl.config import HealConfig
            >>> from shl.models.tiny import tiny_gemma
            >>> path = tempfile.mkdtemp() + "/adapter.safetensors"
            >>> fresh_adapter(tiny_gemma(), HealConfig(rank=2)).save(path)
            >>> Adapter.load(path, tiny_gemma()).rank
            2
            >>> Adapter.load(path, tiny_gemma(seed=1))
            Traceback (most recent call last):
            shl.utils.errors.ShlError: ... was made on weights of tiny-gemma with the hash ...
        """
        adapter = cls.read(path)
        check_made_for(
            model,
            str(path),
            adapter.model_name,
            adapter.weights,
            adapter.dtype,
            any_weights=any_weights,
        )
        check_fits(model, adapter)
        device = model.W_U.device
        down = {key: a.to(device) for key, a in adapter.down.items()}
        return replace(adapter, down=down, up={key: b.to(device) for key, b in adapter.up.items()})


def check_fits(model: HookedTransformer, adapter: Adapter) -> None:
    """Raise unless every site of the adapter exists on the model with the same widths."""
    for site in adapter.sites:
        (expected,) = sites_of(model, [site.kind], [site.layer])
        require(
            expected == site,
            f"the adapter's {site.name} maps {site.d_in} to {site.d_out} features, on "
            f"{model.cfg.model_name} it maps {expected.d_in} to {expected.d_out}.",
        )


def default_layers(model: HookedTransformer) -> Sequence[int]:
    """All layers but the first and last sixth, which are closest to embedding and unembedding."""
    return band(model, 1 / 6, 5 / 6)


def fresh_adapter(
    model: HookedTransformer,
    config: HealConfig,
    *,
    seed: int = 0,
    round: int | None = None,
    axis: str | None = None,
) -> Adapter:
    """A trainable fp32 adapter: A uniform in +-1/sqrt(d_in), as in nn.Linear and PEFT, and B zero.

    Raises:
        ShlError: the model does not have a site or layer.

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> adapter = fresh_adapter(tiny_gemma(), HealConfig(rank=2, sites=("q",), layers=(0,)))
        >>> [tuple(p.shape) for p in adapter.parameters()]
        [(2, 32), (64, 2)]
    """
    layers = default_layers(model) if config.layers is None else config.layers
    sites = sites_of(model, config.sites, layers)
    device = model.W_U.device
    down, up = {}, {}
    for site in sites:
        draw = torch.rand(
            config.rank, site.d_in, generator=generator_for(seed, "adapter", site.name)
        )
        a = ((2 * draw - 1) / site.d_in**0.5).to(device)
        down[site.name] = a.requires_grad_(True)
        up[site.name] = torch.zeros(site.d_out, config.rank, device=device, requires_grad=True)
    scale = config.lora_alpha / config.rank
    provenance = name_of(model), round, weights_hash(model), dtype_of(model), axis
    return Adapter(sites, down, up, scale, *provenance)


def singular_value_penalty(adapter: Adapter, iterations: int = 12) -> Float[Tensor, ""]:
    """Mean over sites of the squared largest singular value of s B A.

    Power iteration without a gradient gives the top right singular vector v. The gradient of
    |s B A v|^2 at that v is that of the squared singular value (Danskin's theorem); it is 0 at
    B = 0.
    """
    total = torch.zeros(())
    for site in adapter.sites:
        a, b = adapter.down[site.name], adapter.up[site.name]
        with torch.no_grad():
            v = a.sum(0)
            for _ in range(iterations):
                image = a.T @ (b.T @ (b @ (a @ v)))
                norm = image.norm()
                v = image / norm if float(norm) > 0 else v / v.norm().clamp(min=1e-30)
        total = total.to(a.device) + ((b @ (a @ v)) * adapter.scale).square().sum()
    return total / len(adapter.sites)
