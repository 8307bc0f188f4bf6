"""The low-rank update s B A x as hooks, for trainable and for frozen factors alike."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from shl.fast.fused_lora import Joint
from shl.fast.linear import LARGE_WEIGHT, linear
from shl.hooks.handle import Handle, Register
from shl.hooks.positions import Scope, follow
from shl.hooks.sites import Site, linear_input, linear_output, residual_after
from shl.utils.errors import ShlError
from shl.utils.shapes import Down, Up

MANY = 4
"""From more rows than these, a large B is added faster through `linear`."""


class LowRank(Handle):
    """Adds s B A x to each site's output, where x is that site's own input; B A is never formed.

    Sites that read the same x (q, k and v; gate and up) share one product with their stacked A.
    Computed in the factors' dtype, returned in that of the output. `scope` scales the update per
    token; `model.reset_hooks()` leaves all of it on. With `joint`, frozen factors leave their
    hooks for products of their own while a batch decodes (`shl.fast.fused_lora`).
    """

    def __init__(
        self,
        model: HookedTransformer,
        sites: Sequence[Site],
        down: Mapping[str, Down],
        up: Mapping[str, Up],
        scale: float,
        scope: Scope | None = None,
        *,
        joint: bool = False,
    ) -> None:
        super().__init__(model)
        # Of each group of sites that may leave its hooks while a batch decodes: those hooks.
        self._groups: dict[Joint, list[Register]] = {}
        self._inside: list[Joint] = []
        self.scope = scope = scope or Scope(model)
        self.scale = scale
        self._factors: dict[int, Tensor] = {}
        self._per_token = not scope.plain
        if not isinstance(scope.dose, Tensor) and not self._per_token:
            self.scale = scale * scope.dose  # nothing to do per token
        else:
            follow(self, [site.layer for site in sites], self._follow)
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
                    module = residual_after(model, site.layer)
                    self._add(module, self._whole(site, factors, module))
                continue
            module, argument = linear_input(model, group[0])
            hooks = [self._add(module, self._see(names, factors, fixed), argument=argument)]
            for site in group:
                output = linear_output(model, site)
                hooks.append(self._add(output, self._outer(site, output)))
            ups = [self.up[name] for name in names]
            if joint and fixed is not None and not any(b.requires_grad for b in ups):
                factor = partial(self._factors.get, group[0].layer)
                self._groups[Joint(model, group, factors, ups, self.scale, factor)] = hooks

    def _see(
        self, names: list[str], factors: list[Tensor], fixed: Tensor | None
    ) -> Callable[[Tensor], None]:
        ranks = [len(a) for a in factors]

        def see(x: Tensor) -> None:
            stacked = torch.cat(factors) if fixed is None else fixed
            inner = linear(_flat(x, stacked, names[0]), stacked)
            if len(names) == 1:
                self._inner[names[0]] = inner
            else:
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

    @property
    def on(self) -> bool:
        """False inside `suspended(model)` and after `remove()`."""
        return super().on or (bool(self._inside) and not self._inside[0].off)

    def _decoding(self, rows: int) -> bool:
        own = {handle.id for handle in self._torch_handles.values()}
        chosen = [group for group in self._groups if group.may(rows, own)]
        for group in chosen:
            for register in self._groups[group]:
                self._torch_handles.pop(register).remove()
            group.enter()
        self._inside += chosen
        return bool(chosen)

    def _decoded(self) -> None:
        for group in self._inside:
            group.leave()
            for register in self._groups[group]:
                # Before all that came in the meantime, as it was.
                self._place(register, prepend=True)
        self._inside.clear()

    def _gate(self, closed: bool) -> None:
        for group in self._inside:
            group.off = closed

    def remove(self) -> None:
        """Take the hooks off, and free the copies of weights; a second call does nothing."""
        for group in self._inside:
            group.leave()
        self._inside.clear()
        self._groups.clear()
        super().remove()

    def _follow(self, layer: int, at: Tensor) -> None:
        self._factors[layer] = rearrange(self.scope.factor(at), "batch pos 1 -> (batch pos) 1")

    def _outer(self, site: Site, module: nn.Module) -> Callable[[Tensor], Tensor | None]:
        add = self._adder(site, module)
        return lambda y: add(y, self._inner.pop(site.name))

    def _whole(
        self, site: Site, factors: list[Tensor], module: nn.Module
    ) -> Callable[[Tensor], Tensor | None]:
        add = self._adder(site, module)
        return lambda h: add(h, linear(_flat(h, factors[0], site.name), factors[0]))

    def _adder(self, site: Site, module: nn.Module) -> Callable[[Tensor, Tensor], Tensor | None]:
        up, scale, width = self.up[site.name], self.scale, site.d_out
        frozen = None if up.requires_grad else up.T

        def add(y: Tensor, inner: Tensor) -> Tensor | None:
            """y with the update of A x; None where y itself has become that."""
            if self._per_token:
                inner = inner * self._factors[site.layer].to(inner.dtype)
            turned = up.T if frozen is None else frozen
            if y.dtype != up.dtype:
                update = (torch.mm(inner, turned) * scale).to(y.dtype)
                return y + update.view(y.shape)
            if torch.is_grad_enabled() or _seen(module) or not y.is_contiguous():
                return torch.addmm(y.reshape(-1, width), inner, turned, alpha=scale).view(y.shape)
            # Nobody else has seen y, and no derivative needs what it was.
            flat = y.view(-1, width)
            if len(inner) > MANY and up.numel() >= LARGE_WEIGHT:
                flat.add_(linear(inner, up), alpha=scale)
            else:
                flat.addmm_(inner, turned, alpha=scale)
            return None

        return add


def _seen(module: nn.Module) -> bool:
    """Whether somebody else's hook may have kept what the module gave; a HookPoint gives what it
    was given."""
    taken = isinstance(module, HookPoint) and bool(module._forward_pre_hooks)
    return taken or len(module._forward_hooks) > 1


def _flat(x: Tensor, a: Tensor, name: str) -> Tensor:
    """`[rows, d_in]` in the dtype of A."""
    width = a.shape[1]
    if x.shape[-1] != width and x.shape[2:].numel() != width:
        raise ShlError(
            f"{name} sees an input of shape {tuple(x.shape)}, an adapter needs [batch, pos, "
            f"{width}]; are attention's inputs split by head?"
        )
    return x.reshape(-1, width).to(a.dtype)
