"""Low-rank adapters: factors per site, initialisation, files, and attachment to a model."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from reprlib import repr as short
from typing import Any, ClassVar

import torch
from torch import Tensor

from shl.config import SITE_KINDS, HealConfig
from shl.hooks.fingerprint import Stored, dtype_of, name_of, weights_hash
from shl.hooks.lora import LoRA
from shl.hooks.positions import Positions, Scope
from shl.hooks.sites import Site, band, device_of, sites_of
from shl.utils.errors import require
from shl.utils.files import MADE_ON, NONE, Schema, read_safetensors
from shl.utils.model import Model
from shl.utils.seeds import generator_for
from shl.utils.shapes import Bool, Down, Float, Up


def common_value(values: Iterable[Any]) -> Any:
    """The common value of all `values`, or None if they differ.

    Example:
        >>> common_value([8, 8]), common_value([8, 4])
        (8, None)
    """
    first, *others = values
    return first if all(value == first for value in others) else None


def read_sites(what: object, rows: list[Any], tensors: Mapping[str, Tensor]) -> tuple[Site, ...]:
    """The sites in a file's metadata, which must be those of its tensors.

    Raises:
        ShlError: a site is invalid or repeated or has other hooks, or the tensors are not those of
            the sites.
    """
    sites = tuple(_site(what, row) for row in rows)
    require(len(sites) > 0, f"{what} names no site.")
    require(len(set(sites)) == len(sites), f"{what} names a site twice.")
    expected = {f"{site.name}.{factor}" for site in sites for factor in "AB"}
    differ = sorted(set(tensors) ^ expected)
    require(not differ, f"the tensors and the site table of {what} differ at {differ[:3]}.")
    return sites


def _site(what: object, row: Any) -> Site:
    valid = isinstance(row, list) and [type(x) for x in row] == [str, *[int] * 4, str, str]
    require(
        valid,
        f"{what} has the site {short(row)}, it must be [kind, layer, d_in, d_out, rank, hook of "
        "the input, hook of the output].",
    )
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
    return site


@dataclass(frozen=True, eq=False)
class Adapter(Stored):
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

    FORMAT: ClassVar[str] = "shl-adapter-3"
    SCHEMA: ClassVar[Schema] = {
        **MADE_ON,
        "axis": (str, NONE),
        "scale": (float,),
        "rank": (int, NONE),
        "alpha": (float, NONE),
        "sites": (list,),
    }
    """The metadata of a file, in addition to `format` and `identity`. `scale` is s = alpha / rank;
    `rank` and `alpha` are null if sites differ in rank; a site is `[kind, layer, d_in, d_out, rank,
    hook of the input, hook of the output]`."""

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
        model: Model,
        *,
        dose: float | Float[Tensor, " batch"] = 1.0,
        mask: Bool[Tensor, "batch pos"] | None = None,
        positions: Positions | None = None,
    ) -> LoRA:
        """Add the adapter to a model; returns a context manager with `.remove()`.

        Args:
            dose, mask, positions: factor of the update for each token, as in
                `shl.hooks.positions.Scope`.

        Raises:
            ShlError: the model's sites differ from the adapter's, or dose, mask or positions are
                out of range.
        """
        check_fits(model, self)
        scope = Scope(model, dose, mask=mask, positions=positions)
        return LoRA(model, self.sites, self.down, self.up, self.scale, scope)

    def frozen(self) -> "Adapter":
        """A detached copy that does not require gradients."""
        down, up = ({k: x.detach().clone() for k, x in f.items()} for f in (self.down, self.up))
        return replace(self, down=down, up=up)

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

    def _content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"{key}.A": a for key, a in self.down.items()}
        tensors |= {f"{key}.B": b for key, b in self.up.items()}
        scale, rank, ranks = float(self.scale), self.rank, self.ranks
        return tensors, {
            "model": self.model_name,
            "weights": self.weights,
            "dtype": self.dtype,
            "axis": self.axis,
            "round": self.round,
            "scale": scale,
            "rank": rank,
            "alpha": None if rank is None else scale * rank,
            "sites": [
                [s.kind, s.layer, s.d_in, s.d_out, ranks[s.name], *s.hooks] for s in self.sites
            ],
        }

    @classmethod
    def read(cls, path: str | Path) -> "Adapter":
        """Read a file written by `save`, without a model; the tensors are on the CPU.

        Raises:
            ShlError: the file is missing, damaged or modified, or its metadata is invalid or does
                not match the tensors.
        """
        meta, tensors = read_safetensors(path, cls.FORMAT, cls.SCHEMA)
        sites = read_sites(path, meta["sites"], tensors)
        for site, row in zip(sites, meta["sites"], strict=True):
            for factor, shape in (("A", (row[4], site.d_in)), ("B", (site.d_out, row[4]))):
                found = tuple(tensors[f"{site.name}.{factor}"].shape)
                require(
                    found == shape,
                    f"{factor} of {site.name} in {path} has shape {found}, by the site table it "
                    f"must be {shape}.",
                )
        down, up = ({s.name: tensors[f"{s.name}.{factor}"] for s in sites} for factor in "AB")
        keys = ("scale", "model", "round", "weights", "dtype", "axis")
        adapter = cls(sites, down, up, *(meta[key] for key in keys))
        for key, value in adapter._content()[1].items():
            require(
                meta[key] == value,
                f"{path} has {key} = {short(meta[key])}, its tensors give {short(value)}.",
            )
        return adapter

    @classmethod
    def load(cls, path: str | Path, model: Model, *, any_weights: bool = False) -> "Adapter":
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
        it = cls.read(path)
        it.check_made_for(model, path, any_weights=any_weights)
        check_fits(model, it)
        on = {site.name: device_of(model, site.layer) for site in it.sites}
        down, up = ({k: x.to(on[k]) for k, x in f.items()} for f in (it.down, it.up))
        return replace(it, down=down, up=up)


def check_fits(model: Model, adapter: Adapter) -> None:
    """Raise unless every site of the adapter exists on the model with the same widths."""
    for site in adapter.sites:
        (expected,) = sites_of(model, [site.kind], [site.layer])
        require(
            expected == site,
            f"the adapter's {site.name} maps {site.d_in} to {site.d_out} features, on "
            f"{model.cfg.model_name} it maps {expected.d_in} to {expected.d_out}.",
        )


def adapter_sites(model: Model, config: HealConfig) -> tuple[Site, ...]:
    """The sites of an adapter with these settings; raises as `fresh_adapter`."""
    # By default without the first and last sixth, which are closest to embedding and unembedding.
    layers = band(model, 1 / 6, 5 / 6) if config.layers is None else config.layers
    width = model.cfg.d_model
    require(
        config.rank <= width,
        f"rank is {config.rank}, it must be at most {width}, the width of {model.cfg.model_name}.",
    )
    return sites_of(model, config.sites, layers)


def fresh_adapter(
    model: Model,
    config: HealConfig,
    *,
    seed: int = 0,
    round: int | None = None,
    axis: str | None = None,
) -> Adapter:
    """A trainable fp32 adapter: A uniform in +-1/sqrt(d_in), as in nn.Linear and PEFT, and B zero.

    Raises:
        ShlError: the model does not have a site or layer, or the rank is above its width.

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> adapter = fresh_adapter(tiny_gemma(), HealConfig(rank=2, sites=("q",), layers=(0,)))
        >>> [tuple(p.shape) for p in adapter.parameters()]
        [(2, 32), (64, 2)]
    """
    sites, rank = adapter_sites(model, config), config.rank
    down, up = {}, {}
    for site in sites:
        device = device_of(model, site.layer)
        draw = torch.rand(rank, site.d_in, generator=generator_for(seed, "adapter", site.name))
        a = ((2 * draw - 1) / site.d_in**0.5).to(device)
        down[site.name] = a.requires_grad_(True)
        up[site.name] = torch.zeros(site.d_out, rank, device=device, requires_grad=True)
    scale = config.lora_alpha / rank
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
