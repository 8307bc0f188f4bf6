"""Finished adapters as frozen hooks: one stacked (A, B) per site, however many rounds there were.

Nothing is merged into the weights, so base is one `suspended(model)` away.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from shl.errors import check
from shl.hooks import DeltaHandle
from shl.lora import Adapter, check_fits
from shl.sites import Site


def stack(adapters: Sequence[Adapter]) -> Adapter:
    """One adapter that acts like `adapters` applied one after the other; scales go into B.

    At a linear site updates add: A and B are concatenated. At the residual site they compose,
    (I + B2 A2)(I + B1 A1) = I + B1 A1 + B2 A2 (I + B1 A1), so A2 becomes A2 + A2 B1 A1 first.

    Raises:
        ShlError: no adapter, or adapters of different models.

    Example:
        >>> from shl.config import HealConfig
        >>> from shl.lora import fresh_adapter
        >>> from shl.tiny import tiny_gemma
        >>> one = fresh_adapter(tiny_gemma(), HealConfig(rank=2, sites=("q",), layers=(0,)))
        >>> stack([one, one]).down["blocks.0.q"].shape
        torch.Size([4, 32])
    """
    check(len(adapters) > 0, "there are no adapters to stack, give at least one.")
    models = {adapter.model_name for adapter in adapters}
    check(len(models) == 1, f"the adapters were made for different models: {sorted(models)}.")
    sites = {site.name: site for adapter in adapters for site in adapter.sites}
    down: dict[str, Tensor] = {}
    up: dict[str, Tensor] = {}
    for adapter in adapters:
        for site in adapter.sites:
            a = adapter.down[site.name].detach()
            b = adapter.up[site.name].detach() * adapter.scale
            if site.name not in down:
                down[site.name], up[site.name] = a, b
                continue
            if site.kind == "resid":
                a = a + (a @ up[site.name]) @ down[site.name]
            down[site.name] = torch.cat([down[site.name], a])
            up[site.name] = torch.cat([up[site.name], b], dim=1)
    ordered = tuple(sorted(sites.values(), key=lambda site: (site.layer, site.name)))
    return Adapter(ordered, down, up, 1.0, models.pop())


class Baked(DeltaHandle):
    """A frozen stack of adapters on a model: a context manager with `.remove()`."""

    def __init__(self, model: HookedTransformer, adapters: Sequence[Adapter]) -> None:
        for adapter in adapters:
            check_fits(model, adapter)
        self.stacked = stack(adapters) if adapters else None
        super().__init__(model, self.stacked.sites if self.stacked else (), self._delta)

    def _delta(self, site: Site, x: Tensor) -> Tensor:
        assert self.stacked is not None
        return self.stacked.delta(site, x)


def baked(model: HookedTransformer, adapters: Sequence[Adapter]) -> Baked:
    """Apply finished adapters, in order, while the returned context lasts; none is base itself.

    Raises:
        ShlError: an adapter made for another model or other sites.

    Example:
        >>> from shl.tiny import tiny_gemma
        >>> model = tiny_gemma()
        >>> with baked(model, []):
        ...     logits = model("plain TransformerLens from here")
    """
    return Baked(model, adapters)
