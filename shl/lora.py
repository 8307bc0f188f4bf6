"""The trainable low-rank adapter, as hooks: y = W x + s B A x, s = lora_alpha / rank.

Hu et al. 2021, arXiv:2106.09685. B starts at 0, so a fresh adapter is an exact identity. At the
residual site the update is h + s B A h after the layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from shl.config import HealConfig
from shl.errors import check
from shl.files import read_safetensors, write_safetensors
from shl.low_rank import LowRank
from shl.seeds import generator_for
from shl.shapes import Down, Float, Up
from shl.sites import Site, band, sites_of

FORMAT = "shl-adapter-2"


@dataclass(frozen=True, eq=False)
class Adapter:
    """Factors A `[rank, d_in]` and B `[d_out, rank]` per site, by site name.

    `rank` is that of every site; `round` is where in a loop it was trained (or None).
    """

    sites: tuple[Site, ...]
    down: dict[str, Down]
    up: dict[str, Up]
    scale: float
    model_name: str
    round: int | None = None

    def __post_init__(self) -> None:
        names = [site.name for site in self.sites]
        for kind, factors in (("A", self.down), ("B", self.up)):
            check(
                sorted(factors) == sorted(names),
                f"an adapter's {kind} has sites {sorted(factors)}, it must have {sorted(names)}.",
            )
        for site in self.sites:
            seen = (*self.down[site.name].shape, *self.up[site.name].shape)
            rank = seen[0]
            check(
                seen == (rank, site.d_in, site.d_out, rank),
                f"the factors of {site.name} have shapes {seen[:2]} and {seen[2:]}, they must be "
                f"(rank, {site.d_in}) and ({site.d_out}, rank).",
            )

    def parameters(self) -> list[Tensor]:
        """A and B of every site, in order."""
        return [f[site.name] for site in self.sites for f in (self.down, self.up)]

    def attach(self, model: HookedTransformer) -> LowRank:
        """Put the adapter on a model, as a context manager with `.remove()`.

        Raises:
            ShlError: the model has other sites than those the adapter was made for.
        """
        check_fits(model, self)
        return LowRank(model, self.sites, self.down, self.up, self.scale)

    def frozen(self) -> "Adapter":
        """A copy that no optimiser can reach."""
        return Adapter(
            self.sites,
            {key: a.detach().clone() for key, a in self.down.items()},
            {key: b.detach().clone() for key, b in self.up.items()},
            self.scale,
            self.model_name,
            self.round,
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

    def save(self, path: str | Path) -> None:
        """Write safetensors, with the site table and the model's name in its metadata."""
        meta = {
            "model": self.model_name,
            "scale": self.scale,
            "round": self.round,
            "sites": [[s.kind, s.layer, s.d_in, s.d_out] for s in self.sites],
        }
        tensors = {f"{key}.A": a for key, a in self.down.items()}
        tensors |= {f"{key}.B": b for key, b in self.up.items()}
        write_safetensors(path, FORMAT, tensors, meta)

    @classmethod
    def load(cls, path: str | Path, model: HookedTransformer) -> "Adapter":
        """Read what `save` wrote and check that it was made for `model`; nothing is skipped.

        Raises:
            ShlError: missing or damaged file, another model, another site table, or keys that
                do not match it.
        """
        meta, tensors = read_safetensors(path, FORMAT)
        check(
            meta["model"] == model.cfg.model_name,
            f"{path} was made for {meta['model']}, the model is {model.cfg.model_name}.",
        )
        sites = tuple(Site(*entry) for entry in meta["sites"])
        wanted = {f"{site.name}.{factor}" for site in sites for factor in "AB"}
        check(
            set(tensors) == wanted,
            f"{path} differs from its own site table at {sorted(set(tensors) ^ wanted)[:3]}.",
        )
        device = model.W_U.device
        adapter = cls(
            sites,
            {site.name: tensors[f"{site.name}.A"].to(device) for site in sites},
            {site.name: tensors[f"{site.name}.B"].to(device) for site in sites},
            float(meta["scale"]),
            meta["model"],
            meta["round"],
        )
        check_fits(model, adapter)
        return adapter


def check_fits(model: HookedTransformer, adapter: Adapter) -> None:
    """Raise unless every site of the adapter exists on the model with the same widths."""
    for site in adapter.sites:
        (own,) = sites_of(model, [site.kind], [site.layer])
        check(
            own == site,
            f"the adapter's {site.name} maps {site.d_in} to {site.d_out} features, on "
            f"{model.cfg.model_name} it maps {own.d_in} to {own.d_out}.",
        )


def default_layers(model: HookedTransformer) -> Sequence[int]:
    """All layers but the first and last sixth, where the embedding and the readout live."""
    return band(model, 1 / 6, 5 / 6)


def fresh_adapter(
    model: HookedTransformer, config: HealConfig, *, seed: int = 0, round: int | None = None
) -> Adapter:
    """A trainable adapter: A uniform in +-1/sqrt(d_in) (as nn.Linear and PEFT), B zero; fp32.

    Raises:
        ShlError: a site or layer that the model does not have.

    Example:
        >>> from shl.tiny import tiny_gemma
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
    return Adapter(sites, down, up, scale, model.cfg.model_name, round)


def singular_value_penalty(adapter: Adapter, iterations: int = 12) -> Float[Tensor, ""]:
    """Mean over sites of the squared largest singular value of s B A.

    The top right singular vector comes from power iteration without a gradient; at that vector
    the gradient of |s B A v|^2 is that of the squared singular value (Danskin), and 0 at B = 0.
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
