"""LoRA as hooks: y = W x + s B A x, with trainable or frozen factors.

Hu et al. 2021, arXiv:2106.09685. B A is never formed and W is not changed. At the residual site h
becomes h + s B A h after the layer.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shl.hooks.handle import Handle
from shl.hooks.positions import Scope, track_positions
from shl.hooks.sites import Site, linear_input, linear_output
from shl.utils.errors import ShlError
from shl.utils.model import Model
from shl.utils.shapes import Down, Up


class LoRA(Handle):
    """Adds s B A x to the output of each site, where x is the site's input.

    Sites with the same input (q, k and v; gate and up) share one product with their stacked A. The
    update is computed in the factors' dtype and added in the output's.

    Args:
        down: A `[rank, d_in]` by site name.
        up: B `[d_out, rank]` by site name.
        scale: s = lora_alpha / rank.
        scope: dose, mask and positions of the update; None is a dose of 1 for every token.
    """

    def __init__(
        self,
        model: Model,
        sites: Sequence[Site],
        down: Mapping[str, Down],
        up: Mapping[str, Up],
        scale: float,
        scope: Scope | None = None,
    ) -> None:
        super().__init__(model)
        self.sites, self.down, self.up, self.scale = tuple(sites), dict(down), dict(up), scale
        self.scope = scope or Scope(model)
        self.per_row, self.rows = self.scope.per_row, self.scope.rows
        self._inner: dict[str, Tensor] = {}  # A x by site, from the input hook to the output hook
        self._factors: dict[int, Tensor] = {}  # `[tokens, 1]` by layer
        if not self.scope.plain:
            track_positions(self, [site.layer for site in sites], self._set_factors)
        readers: dict[tuple[int, bool], list[Site]] = {}
        for site in self.sites:
            module, argument = linear_input(model, site)
            # One module may be read both at its argument and at its output.
            readers.setdefault((id(module), argument is None), []).append(site)
        for group in readers.values():
            module, argument = linear_input(model, group[0])
            read = partial(self._read, group, self._stack(group))
            if argument is None:
                self.add_hook(module, read)
            else:
                self.add_pre_hook(module, partial(_read_argument, argument, read))
            for site in group:
                self.add_hook(linear_output(model, site), partial(self._add, site))

    def _stack(self, group: Sequence[Site]) -> Tensor | None:
        """The concatenated A of a group if frozen; None if trainable, because they change."""
        factors = [self.down[site.name] for site in group]
        if any(a.requires_grad for a in factors):
            return None
        stacked = torch.cat(factors)
        views = stacked.split([len(a) for a in factors])  # views, to store each A only once
        self.down.update((site.name, a) for site, a in zip(group, views, strict=True))
        return stacked

    def _set_factors(self, layer: int, at: Tensor) -> None:
        self._factors[layer] = self.scope.factor(at).flatten(0, 1)

    def _read(self, group: Sequence[Site], stacked: Tensor | None, x: Tensor) -> None:
        factors = [self.down[site.name] for site in group]
        stacked = torch.cat(factors) if stacked is None else stacked
        d_in = stacked.shape[1]
        if x.shape[-1] != d_in and x.shape[2:].numel() != d_in:
            raise ShlError(
                f"the input of {group[0].name} has shape {tuple(x.shape)}, an adapter needs "
                f"[batch, pos, {d_in}]; attention's inputs must not be split by head."
            )
        inner = x.reshape(-1, d_in).to(stacked.dtype) @ stacked.T
        parts = inner.split([len(a) for a in factors], 1)
        self._inner.update((site.name, part) for site, part in zip(group, parts, strict=True))

    def _add(self, site: Site, y: Tensor) -> Tensor:
        inner, up, scale = self._inner.pop(site.name), self.up[site.name], self.scale
        if self.scope.plain:
            assert not isinstance(self.scope.dose, Tensor)
            scale = scale * self.scope.dose
        else:
            inner = inner * self._factors[site.layer].to(inner.dtype)
        rows = y.reshape(-1, site.d_out)
        if y.dtype == up.dtype:
            return torch.addmm(rows, inner, up.T, alpha=scale).view(y.shape)
        return (rows + (inner @ up.T * scale).to(y.dtype)).view(y.shape)


def _read_argument(
    argument: str, read: partial[None], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    read(kwargs.get(argument, *args[:1]))
