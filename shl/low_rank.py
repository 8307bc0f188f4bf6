"""The low-rank update s B A x as hooks, for trainable and for frozen factors alike."""

from collections.abc import Callable, Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import linear
from transformer_lens import HookedTransformer

from shl.errors import check
from shl.hooks import Handle
from shl.scope import Scope, follow
from shl.shapes import Down, Up
from shl.sites import Site, linear_input, linear_output, residual_after


class LowRank(Handle):
    """Adds s B A x to each site's output, where x is that site's own input; B A is never formed.

    Sites that read the same x (q, k and v; gate and up) share one product with their stacked A.
    Computed in the factors' dtype, returned in that of the output. `scope` scales the update per
    token; `model.reset_hooks()` leaves all of it on.
    """

    def __init__(
        self,
        model: HookedTransformer,
        sites: Sequence[Site],
        down: Mapping[str, Down],
        up: Mapping[str, Up],
        scale: float,
        scope: Scope | None = None,
    ) -> None:
        super().__init__(model)
        self.scope = scope = scope or Scope(model)
        self.scale = scale
        self._factors: dict[int, Tensor] = {}
        self._per_token = not scope.plain
        if not isinstance(scope.dose, Tensor) and not self._per_token:
            self.scale = scale * scope.dose  # nothing to do per token
        else:
            follow(self, [site.layer for site in sites], self._place)
        # [rank, d_out] in memory, where one row times a wide B is twice as fast.
        self.up = {k: b if b.requires_grad else b.T.contiguous().T for k, b in up.items()}
        self.down = dict(down)
        # A x waits here between the hook that sees x and the hooks that add.
        self._inner: dict[str, Tensor] = {}
        groups: dict[tuple[int, bool], list[Site]] = {}
        for site in sites:
            module, argument = linear_input(model, site)
            groups.setdefault((id(module), argument is not None), []).append(site)
        for group in groups.values():
            names = [site.name for site in group]
            factors = [down[name] for name in names]
            # Trainable factors change, so they are stacked anew each time.
            fixed = None
            if not any(a.requires_grad for a in factors):
                fixed = torch.cat(factors) if len(factors) > 1 else factors[0]
                factors = list(fixed.split([len(a) for a in factors]))
                self.down.update(zip(names, factors, strict=True))
            if group[0].kind == "resid":
                for site in group:
                    self._add(residual_after(model, site.layer), self._whole(site, factors))
                continue
            module, argument = linear_input(model, group[0])
            self._add(module, self._see(names, factors, fixed), argument=argument)
            for site in group:
                self._add(linear_output(model, site), self._outer(site))

    def _see(
        self, names: list[str], factors: list[Tensor], fixed: Tensor | None
    ) -> Callable[[Tensor], None]:
        ranks = [len(a) for a in factors]

        def see(x: Tensor) -> None:
            stacked = torch.cat(factors) if fixed is None else fixed
            width = stacked.shape[1]
            check(
                x.shape[-1] == width or x.shape[2:].numel() == width,
                f"{names[0]} sees an input of shape {tuple(x.shape)}, an adapter needs [batch, "
                f"pos, {width}]; are attention's inputs split by head?",
            )
            inner = linear(x.reshape(-1, width).to(stacked.dtype), stacked)
            self._inner.update(zip(names, inner.split(ranks, 1), strict=True))

        return see

    @property
    def per_row(self) -> bool:
        """Whether rows of a batch have a dose or mask of their own."""
        return self.scope.per_row

    @property
    def rows(self) -> int | None:
        """How many rows have one; None where all are treated alike."""
        return self.scope.rows

    def _place(self, layer: int, at: Tensor) -> None:
        self._factors[layer] = rearrange(self.scope.factor(at), "batch pos 1 -> (batch pos) 1")

    def _outer(self, site: Site) -> Callable[[Tensor], Tensor]:
        def add(y: Tensor) -> Tensor:
            return self._added(y, self._inner.pop(site.name), site)

        return add

    def _whole(self, site: Site, factors: list[Tensor]) -> Callable[[Tensor], Tensor]:
        def add(h: Tensor) -> Tensor:
            inner = linear(h.reshape(-1, h.shape[-1]).to(factors[0].dtype), factors[0])
            return self._added(h, inner, site)

        return add

    def _added(self, y: Tensor, inner: Tensor, site: Site) -> Tensor:
        up = self.up[site.name]
        if self._per_token:
            inner = inner * self._factors[site.layer].to(inner.dtype)
        flat = y.reshape(-1, len(up))
        if y.dtype == up.dtype:
            return torch.addmm(flat, inner, up.T, alpha=self.scale).view(y.shape)
        return (flat + (linear(inner, up) * self.scale).to(y.dtype)).view(y.shape)
