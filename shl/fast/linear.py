"""Matrix products on a CPU, in fp32.

`linear` is `torch.nn.functional.linear` with the same precision. For few rows of x and a large W,
as in decoding, each thread multiplies its own part of W, because MKL splits a single such product
poorly.

`onednn_linear` computes a large product by oneDNN, which torch ships but uses for other dtypes
only. On AMD processors MKL reaches 50 to 90 % of oneDNN's speed. oneDNN adds all terms of a dot
product in sequence, where MKL adds in blocks, so its rounding error is up to 3.7 times MKL's. It is
meant for sums over the vocabulary, not for a model's forward pass.
"""

import torch
from torch import Tensor
from torch.nn import functional

FEW_ROWS = 128
"""With more rows MKL's own threading is faster."""
LARGE_WEIGHT = 1 << 15
"""For weights with fewer elements, splitting costs more than it saves."""
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""Whether torch has oneDNN's fp32 product, the operator that torch.compile uses for a linear."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`: x `[..., d_in]`, weight `[d_out, d_in]`, bias `[d_out]`.

    Example:
        >>> linear(torch.ones(1, 2), torch.eye(3, 2))
        tensor([[1., 1., 0.]])
    """
    threads = torch.get_num_threads()
    d_out, d_in = weight.shape
    if (
        threads == 1
        or d_out % threads
        or weight.numel() < LARGE_WEIGHT
        or x.shape[-1] != d_in
        or not 0 < x.numel() <= FEW_ROWS * d_in
        or x.device.type != "cpu"
        or not x.dtype == weight.dtype == torch.float32
        or (bias is not None and bias.dtype != torch.float32)
        or not weight.is_contiguous()
        or torch.is_autocast_enabled("cpu")
    ):
        return functional.linear(x, weight, bias)
    rows = x.reshape(1, -1, d_in).expand(threads, -1, -1)
    out = torch.bmm(rows, weight.view(threads, -1, d_in).mT).transpose(0, 1)
    out = out.reshape(*x.shape[:-1], d_out)
    return out if bias is None else out + bias


def onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T`, x `[rows, d_in]`, weight `[d_out, d_in]`, by oneDNN if no gradient is needed,
    both are fp32 on a CPU, W or its transpose is contiguous and `torch.backends.mkldnn.enabled`.

    Example:
        >>> onednn_linear(torch.ones(1, 2), torch.eye(3, 2))
        tensor([[1., 1., 0.]])
    """
    derivative = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if (
        not ONEDNN
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
