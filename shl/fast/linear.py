"""x W^T + b, by whichever of torch's two CPU libraries is faster.

`torch.nn.functional.linear` hands fp32 products on CPUs to MKL, whose kernels on AMD processors
reach half to nine tenths of what oneDNN's reach, which torch carries too but only uses for other
dtypes. Here fp32 products of some size go to oneDNN, gradients of any order included. Of those that
stay with MKL, a few rows times W become one product per thread, since MKL shares a single one
badly. Everything else, under `torch.func`, forward-mode derivatives and autocast too, is torch's
own function. `torch.backends.mkldnn.enabled = False` turns oneDNN off.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

LARGE_WEIGHT = 1 << 18
"""oneDNN costs some 15 us more per call: worth it where W has as many numbers as this,"""
LARGE_PRODUCT = 1 << 23
"""or where rows of x times numbers of W are as many as this."""
DEEPEST = 768
"""oneDNN adds all d_in terms up in one chain, MKL in blocks: with 2,048 of them its rounding error
is 3.7 times MKL's. Deeper products stay with MKL, unless the caller can afford that."""
FEW, SHARED = 128, 1 << 15
"""Up to so many rows, and from so many numbers of W on, each thread gets its own rows of W."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, deep: bool = False) -> Tensor:
    """`x @ weight.T + bias`: x `[..., d_in]`, weight `[d_out, d_in]`, bias `[d_out]`.

    Args:
        deep: let oneDNN have products of any d_in.

    Example:
        >>> linear(torch.ones(1, 2), torch.eye(3, 2))
        tensor([[1., 1., 0.]])
    """
    if not _suits(x, weight, bias, deep):
        threads = _shares(x, weight, bias)
        if threads > 1:
            return _shared(x, weight, bias, threads)
        return functional.linear(x, weight, bias)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)


def _suits(x: Tensor, weight: Tensor, bias: Tensor | None, deep: bool = False) -> bool:
    size, d_in = weight.numel(), weight.shape[-1]
    return (
        (size >= LARGE_WEIGHT or size // max(1, d_in) * x.numel() >= LARGE_PRODUCT)
        and (deep or d_in <= DEEPEST)
        and AVAILABLE
        and bool(torch.backends.mkldnn.enabled)
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and (bias is None or bias.dtype == torch.float32)
        and x.numel() > 0
        and weight.dim() == 2
        # Of any other layout oneDNN knows a loop alone, a hundred times slower.
        and (weight.is_contiguous() or weight.T.is_contiguous())
        and not torch.is_autocast_enabled("cpu")
        # Neither knows the operator: `torch.func` would loop, a dual number lose its tangent.
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def _shares(x: Tensor, weight: Tensor, bias: Tensor | None) -> int:
    d_out, d_in = weight.shape
    threads = torch.get_num_threads()
    shares = (
        threads > 1
        and d_out % threads == 0
        and weight.numel() >= SHARED
        and x.shape[-1] == d_in
        and 0 < x.numel() <= FEW * d_in
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and (bias is None or bias.dtype == torch.float32)
        and weight.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
    )
    return threads if shares else 1


def _shared(x: Tensor, weight: Tensor, bias: Tensor | None, threads: int) -> Tensor:
    d_out, d_in = weight.shape
    rows = x.reshape(1, -1, d_in).expand(threads, -1, -1)
    out = torch.bmm(rows, weight.view(threads, -1, d_in).mT).transpose(0, 1)
    out = out.reshape(*x.shape[:-1], d_out)
    return out if bias is None else out + bias


_PLAIN = (Tensor, nn.Parameter)
AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""Whether this torch has oneDNN, and the operator to which its own compiler lowers a linear layer:
no other way leads to oneDNN's fp32 product."""


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """The product with torch's own gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Activations are only kept for the gradient of a weight that learns.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = linear(upstream[0], weight.T)
        rows = upstream[0].reshape(-1, len(weight))
        if ctx.needs_input_grad[1]:
            of_weight = linear(rows.T, x.reshape(-1, x.shape[-1]).T)
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0)
        return of_x, of_weight, of_bias
