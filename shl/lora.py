"""The trainable low-rank adapter, as hooks: y = W x + s B A x, s = lora_alpha / rank.

Hu et al. 2021, arXiv:2106.09685. B starts at 0, so a fresh adapter is an exact identity. At the
residual site the update is h + s B A h after the layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from shl.adapter import Adapter
from shl.config import HealConfig
from shl.fingerprint import dtype_of, name_of, weights_hash
from shl.seeds import generator_for
from shl.shapes import Float
from shl.sites import band, sites_of


def default_layers(model: HookedTransformer) -> Sequence[int]:
    """All layers but the first and last sixth, where the embedding and the readout live."""
    return band(model, 1 / 6, 5 / 6)


def fresh_adapter(
    model: HookedTransformer,
    config: HealConfig,
    *,
    seed: int = 0,
    round: int | None = None,
    axis: str | None = None,
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
    made_on = name_of(model), round, weights_hash(model), dtype_of(model), axis
    return Adapter(sites, down, up, scale, *made_on)


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
