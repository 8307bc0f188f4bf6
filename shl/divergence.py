"""KL and NLL as one autograd function over a sweep, on whichever sweep is asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from shl.shapes import Float, Hidden, Unembed
from shl.sweep import Sweep, logsumexp, sweep

_FUSED: ContextVar[bool] = ContextVar("shl_fused", default=False)


@contextmanager
def fused() -> Iterator[None]:
    """Let the Triton kernel do the elementwise part of the sweeps in the body.

    Off by default: the kernel is tested under Triton's interpreter and was never timed on a GPU.
    Needs the `triton` package.
    """
    token = _FUSED.set(True)
    try:
        yield
    finally:
        _FUSED.reset(token)


def _sweep(
    student: Hidden,
    delta: Hidden | None,
    unembed: Unembed,
    bias: Float[Tensor, " vocab"] | None,
    mean_w: Hidden | None = None,
) -> Sweep:
    if _FUSED.get():
        # Triton is no requirement, and slow to import.
        from shl.kl_triton import fused_sweep

        return fused_sweep(student, delta, unembed, bias, mean_w=mean_w)
    return sweep(student, delta, unembed, bias, mean_w=mean_w)


class Divergence(torch.autograd.Function):
    """(kl, nll) whose backward only scales gradients that forward has already formed; lazily,
    that of the KL is formed in backward, for the rows that have an upstream gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        h_ref: Tensor | None,
        unembed: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        reverse: bool,
        ref_lse: Tensor | None,
        lazy: bool,
    ) -> tuple[Tensor, Tensor]:
        """KL and NLL per token, `[tok]` each; without a reference the KL is 0."""
        student = h.detach().float()
        # delta before the product: never the difference of two large logits.
        delta = None if h_ref is None else student - h_ref.detach().float()
        kl = torch.zeros(len(student), device=student.device)
        grad_kl = torch.zeros_like(student)
        if h_ref is None or delta is None:
            own = _sweep(student, None, unembed, bias)
        elif not reverse:
            own = _sweep(student, None, unembed, bias)
            other = _sweep(h_ref.detach(), -delta, unembed, bias)
            assert other.kl is not None
            kl, grad_kl = other.kl, own.mean_w - other.mean_w
        elif lazy:
            own = _sweep(student, None, unembed, bias)
            ref_lse = logsumexp(h_ref, unembed, bias) if ref_lse is None else ref_lse
            kl = (delta * own.mean_w).sum(1) - own.lse + ref_lse
        else:
            own = _sweep(student, delta, unembed, bias)
            assert own.kl is not None
            assert own.grad_kl is not None
            kl, grad_kl = own.kl, own.grad_kl
        target_w = unembed.T[targets].float()
        nll = own.lse - (student * target_w).sum(1)
        if bias is not None:
            nll = nll - bias[targets].float()
        ctx.lazy = lazy and reverse and delta is not None
        ctx.save_for_backward(grad_kl, own.mean_w, target_w, student, delta, unembed, bias)
        ctx.dtype = h.dtype
        return kl, nll

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """From upstream gradients of KL and NLL, `[tok]` each, to that of `h`, `[tok, d]`."""
        grad_kl, mean_w, target_w, student, delta, unembed, bias = ctx.saved_tensors
        kl_up, nll_up = upstream
        if ctx.lazy:
            rows = kl_up.nonzero()[:, 0]
            if len(rows):
                part = _sweep(student[rows], delta[rows], unembed, bias, mean_w[rows])
                assert part.grad_kl is not None
                grad_kl = grad_kl.index_copy(0, rows, part.grad_kl)
        grad = kl_up[:, None] * grad_kl + nll_up[:, None] * (mean_w - target_w)
        return grad.to(ctx.dtype), None, None, None, None, None, None, None
