"""Matrix products on a CPU, in fp32.

`linear` is `torch.nn.functional.linear` with the same precision. For few rows of x and a large W,
as in decoding, it is a batch of products of x with parts of W: each thread has its own parts, and a
part fits into a core's cache. On AVX2 with two threads the product of up to 48 rows with a
vocabulary of 262,144 takes 0.4 to 0.65 of the time. x is the first factor: as the second it would
be copied in panels of 16 rows, and 15 rows would take twice the time of 16.

`onednn_linear` computes a large product by oneDNN, which torch ships but uses for other dtypes
only. On AMD processors with AVX-512 MKL reaches 50 to 90 % of oneDNN's speed; with AVX2 alone it is
up to 1.5 times as fast, and is used. oneDNN adds all terms of a dot product in sequence, where MKL
adds in blocks, so its rounding error is up to 3.7 times MKL's. It is meant for sums over the
vocabulary, not for a model's forward pass.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

FEW_ROWS = 128
"""With more rows MKL's own threading is faster."""
LARGE_WEIGHT = 1 << 15
"""For weights with fewer elements, splitting costs more than it saves."""
PART = 1024
"""Rows of W in a part, about as many as a core's cache holds."""
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""Whether torch has oneDNN's fp32 product, the operator that torch.compile uses for a linear."""
ONEDNN_FASTER = ONEDNN and "AVX512" in torch.backends.cpu.get_cpu_capability()
"""Whether it is the faster one here."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`: x `[..., d_in]`, weight `[d_out, d_in]`, bias `[d_out]`.

    Example:
        >>> linear(torch.ones(1, 2), torch.eye(3, 2))
        tensor([[1., 1., 0.]])
    """
    d_out, d_in = weight.shape
    if not _splits(x, weight) or (bias is not None and bias.dtype != torch.float32):
        return functional.linear(x, weight, bias)
    out = linear_in_parts(x.reshape(-1, d_in), weight).reshape(*x.shape[:-1], d_out)
    return out if bias is None else out.add_(bias)


def linear_in_parts(x: Tensor, weight: Tensor) -> Tensor:
    """`linear` of x `[row, d_in]` as a view `[row, part, width]`; a part is `width` rows of W.

    Putting the parts of a large vocabulary into one row costs a tenth of the product.

    Example:
        >>> linear_in_parts(torch.ones(1, 2), torch.eye(3, 2))
        tensor([[[1., 1., 0.]]])
    """
    if not _splits(x, weight):
        return functional.linear(x, weight)[:, None]
    d_out, d_in = weight.shape
    parts = _parts(d_out, torch.get_num_threads())
    out = torch.bmm(x.expand(parts, -1, -1), weight.view(parts, -1, d_in).mT)
    return out.transpose(0, 1)


def _splits(x: Tensor, weight: Tensor) -> bool:
    d_in = weight.shape[1]
    return not (
        (torch.get_num_threads() == 1 and x.numel() == d_in)
        or weight.numel() < LARGE_WEIGHT
        or x.shape[-1] != d_in
        or not 0 < x.numel() <= FEW_ROWS * d_in
        or x.device.type != "cpu"
        or not x.dtype == weight.dtype == torch.float32
        or not weight.is_contiguous()
        or torch.is_autocast_enabled("cpu")
    )


@cache
def _parts(d_out: int, threads: int) -> int:
    """The largest divisor of `d_out` up to a part for each thread or each `PART` rows."""
    return next(n for n in range(max(threads, d_out // PART), 0, -1) if d_out % n == 0)


def onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T`, x `[rows, d_in]`, weight `[d_out, d_in]`, by oneDNN if it is faster, no
    gradient is needed, both are fp32 on a CPU, W or its transpose is contiguous and
    `torch.backends.mkldnn.enabled`.

    Example:
        >>> onednn_linear(torch.ones(1, 2), torch.eye(3, 2))
        tensor([[1., 1., 0.]])
    """
    derivative = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if (
        not ONEDNN_FASTER
        or not torch.backends.mkldnn.enabled
        or derivative
        or not x.device.type == weight.device.type == "cpu"
        or not x.dtype == weight.dtype == torch.float32
        or x.numel() == 0
        # For other layouts oneDNN is a hundred times slower.
        or not (weight.is_contiguous() or weight.T.is_contiguous())
        or torch.is_autocast_enabled("cpu")
    ):
        return functional.linear(x, weight)
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
