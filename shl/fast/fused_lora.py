"""While a batch decodes: adapters in the products of the weights, instead of in hooks.

What adapters cost a decoding step is mostly the number of small products and of calls from Python:
eleven products in every layer, with all seven linear sites. Sites that read one x and that nobody
else watches take two products together instead, base's weights included:

    [y1; y2; ...; t] = [W1; W2; ...; A] x        y_i += s B_i t_i
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from transformer_lens import HookedTransformer

from shl.fast.linear import FEW, linear
from shl.hooks.sites import PARAMETERS, Site, as_linear, component_of, linear_input, linear_output


class Joint:
    """The factors of sites that read one x, in one product with copies of their weights.

    Weights, biases and factors are copied anew in each `decoding` body, at its first step. Ranks
    that differ are filled up with zeros.

    Args:
        down: A `[rank, d_in]` by site.
        up: B `[d_out, rank]` by site, in the same order.
        scale: s; s B A x is added.
        factor: of each token, `[rows, 1]`, times which the update is added; None: 1.
    """

    def __init__(
        self,
        model: HookedTransformer,
        sites: Sequence[Site],
        down: Sequence[Tensor],
        up: Sequence[Tensor],
        scale: float,
        factor: Callable[[], Tensor | None],
    ) -> None:
        self.component: Any = component_of(model, sites[0])
        outputs = (linear_output(model, site) for site in sites)
        self.modules = (self.component, linear_input(model, sites[0])[0], *outputs)
        self.model, self.sites, self.kinds = model, tuple(sites), tuple(s.kind for s in sites)
        self.factors_down, self.factors_up = tuple(down), tuple(up)
        self.scale, self.factor = scale, factor
        self.outs = sum(site.d_out for site in sites)
        self.width = math.gcd(*(site.d_out for site in sites))
        self.rank = max(map(len, down))
        self.blocks = [site.d_out // self.width for site in sites]
        # Which site's t each block of B takes; None: each its own.
        owner = torch.arange(len(sites)).repeat_interleave(torch.tensor(self.blocks))
        self.owner = owner if len(owner) > len(sites) else None
        # [W1; W2; ...; A], the biases, and s B in blocks `[block, rank, width]`.
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.up: Tensor | None = None
        self.copied = self.off = False
        self.forget()

    def may(self, rows: int, own: Collection[int]) -> bool:
        """Whether a batch of so many rows gains, and no hook is on the sites but those with the
        ids `own`: another could see an output before the update or change an input after it."""
        cfg, component = self.component.cfg, self.component
        return (
            rows <= FEW
            and getattr(component, "asks_joint", False)
            and component.joint.keys().isdisjoint(self.kinds)
            and all(a.device.type == "cpu" for a in self.factors_down)
            and all(x.dtype == cfg.dtype for x in (*self.factors_down, *self.factors_up))
            and not torch.is_grad_enabled()
            and all(
                module._forward_hooks.keys() | module._forward_pre_hooks.keys() <= set(own)
                for module in self.modules
            )
        )

    def enter(self) -> None:
        """Take over the products of the sites, whose hooks must be off."""
        self.component.joint.update(dict.fromkeys(self.kinds, self))
        self.copied = False

    def leave(self) -> None:
        """Give the products back."""
        for kind in self.kinds:
            self.component.joint.pop(kind)
        self.forget()

    def forget(self) -> None:
        """Let go of the last x and what came of it."""
        self.x: Tensor | None = None
        self.outputs: dict[str, Tensor] = {}

    def output(self, kind: str, x: Tensor, rows: Tensor) -> Tensor:
        """A site's W x + s B A x + b `[..., d_out]`; `rows` is x as `[..., d_in]`."""
        # q, k and v ask with one x, and only the first of them computes.
        if x is not self.x or kind not in self.outputs:
            if not self.copied:
                self._copy()
                self.copied = True
            self.x, self.outputs = x, self._outputs(rows)
        return self.outputs.pop(kind)

    def _outputs(self, rows: Tensor) -> dict[str, Tensor]:
        """`[..., d_out]` of every site."""
        shape, up = rows.shape[:-1], self.up
        assert up is not None
        assert self.weight is not None
        product = linear(rows.reshape(-1, rows.shape[-1]), self.weight, self.bias)
        base, inner = product[:, : self.outs], product[:, self.outs :]
        factor = self.factor()
        if factor is not None:
            inner = inner * factor.to(inner.dtype)
        if len(up) == 1:
            return {self.kinds[0]: torch.addmm(base, inner, up[0]).view(*shape, -1)}
        n = len(product)
        inner = inner.view(n, -1, self.rank).transpose(0, 1)
        if self.owner is not None:
            inner = inner[self.owner]
        y = torch.baddbmm(base.view(n, -1, self.width).transpose(0, 1), inner, up)
        parts = y.split(self.blocks)
        return {
            # [block, row, width] to [row, d_out], which is one block's layout as it stands.
            kind: (part if count == 1 else part.transpose(0, 1)).reshape(*shape, -1)
            for kind, part, count in zip(self.kinds, parts, self.blocks, strict=True)
        }

    def _copy(self) -> None:
        """Weights, biases and factors as they are now into buffers, made at the first call."""
        sites, rank = self.sites, self.rank
        weights = [
            rearrange(p.data, o, **sizes)
            for p, o, sizes in (as_linear(self.model, site) for site in sites)
        ]
        if self.weight is None:
            like = weights[0]
            # A buffer of inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                self.weight = like.new_zeros(self.outs + len(sites) * rank, sites[0].d_in)
                self.up = like.new_zeros(sum(self.blocks), rank, self.width)
        assert self.up is not None
        parts = self.weight.split([*(site.d_out for site in sites), *[rank] * len(sites)])
        for part, own in zip(parts, (*weights, *self.factors_down), strict=True):
            part[: len(own)].copy_(own)
        for part, own in zip(self.up.split(self.blocks), self.factors_up, strict=True):
            blocks = rearrange(own, "(block width) rank -> block rank width", width=self.width)
            torch.mul(blocks, self.scale, out=part[:, : own.shape[1]])
        names = [PARAMETERS[kind][1] for kind in self.kinds]
        biases = [getattr(self.component, name).data.flatten() for name in names if name]
        # Gemma-3 and Llama have none, TransformerLens gives them zeros.
        any_bias = any(bool(bias.any()) for bias in biases)
        rest = self.weight.new_zeros(len(sites) * rank)
        self.bias = torch.cat([*biases, rest]) if any_bias else None


def joint_output(component: Any, kind: str, x: Tensor, rows: Tensor | None = None) -> Tensor | None:
    """What `component.joint` has for a site's own output `[..., d_out]`; None: nobody entered.

    Args:
        x: what the site reads, the same tensor for all that read it.
        rows: x as `[..., d_in]`, where its heads are apart.
    """
    joint: Joint | None = component.joint.get(kind)
    if joint is None or joint.off:
        return None
    return joint.output(kind, x, x if rows is None else rows)
