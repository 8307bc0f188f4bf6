"""The k largest next-token logits, exactly, without a full-precision product over the vocabulary.

Sampling needs a few of 262,144 logits. A 16-bit product approximates all of them, on CPUs with bf16
instructions in a third to a fifth of the time; the largest few hundred are recomputed in fp32. By
Cauchy-Schwarz the error of an approximate logit is at most

    |h W_v - h' W'_v|  <=  |h| |W_v - W'_v| + |h - h'| |W'_v| + rounding,

where primes denote 16-bit values. If this bound proves that no other token can be among the k
largest, the result equals that of the full product; otherwise the row's full product is computed.
"""

import math
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from shl.fast.hooked import is_hooked, marked_fast
from shl.fast.linear import linear_in_parts
from shl.utils.model import Model

ONE_ROW, ROWS = torch.float16, torch.bfloat16
"""For one row torch is twice as fast in fp16 as in bf16; for several rows only bf16 uses the
processor's 16-bit instructions. A copy of an unembedding is made on first use."""
WIDEN = 8
"""The shortlist has WIDEN * k tokens, and at least 64."""
BLOCK = 128
"""Values in a block of `largest`."""


@dataclass(frozen=True)
class Rough:
    """A 16-bit copy `[vocab, d_model]` of an unembedding, with bounds on its rounding errors."""

    weight: Tensor
    largest_norm: float  # of a rounded row
    largest_error: float  # 2-norm of a row's rounding error
    made_from: tuple[int, int]  # storage and version of the original

    @classmethod
    def of(cls, unembed: Float[Tensor, "vocab d_model"], dtype: torch.dtype) -> "Rough":
        """Round an unembedding and measure the rounding errors in chunks."""
        weight = unembed.to(dtype)
        norm = error = 0.0
        for rough, exact in zip(weight.split(1 << 15), unembed.split(1 << 15), strict=True):
            norm = max(norm, float(rough.float().norm(dim=1).max()))
            error = max(error, float((exact - rough.float()).norm(dim=1).max()))
        return cls(weight, norm, error, _stamp(unembed))

    def bound(
        self, hidden: Float[Tensor, "batch d_model"], logit: Float[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        """Upper bound on the error of a row's approximate logits up to this size."""
        dtype = torch.finfo(self.weight.dtype)
        size = hidden.norm(dim=1)
        off = (hidden - hidden.to(self.weight.dtype).float()).norm(dim=1)
        # Rounding of fp32 sums over d_model products, then of a logit to 16 bits.
        sums = 2 * hidden.shape[1] * torch.finfo(torch.float32).eps * size * self.largest_norm
        rounding = logit.abs() * (dtype.eps / 2) + dtype.smallest_normal
        return size * self.largest_error + off * self.largest_norm + sums + rounding


_ROUGH = WeakTensorKeyDictionary()


def plain_unembedding(model: Model) -> bool:
    """Whether the logits of a fast model with fp32 weights on a CPU have no hooks, so that nothing
    needs all of them in one tensor."""
    unembed = model.unembed
    return (
        marked_fast(unembed)
        and model.W_U.device.type == "cpu"
        and model.W_U.dtype == torch.float32
        and not any(map(is_hooked, (unembed, unembed.hook_in, unembed.hook_out)))
    )


def shortlist_applies(model: Model) -> bool:
    """Whether the 16-bit shortlist can be used and is faster: a `plain_unembedding` on a CPU with
    bf16 instructions."""
    return (
        plain_unembedding(model)
        and not model.W_U.is_inference()  # inference tensors have no version counter
        and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    )


@torch.no_grad()
def top_logits(
    hidden: Float[Tensor, "batch d_model"],
    unembed: Float[Tensor, "d_model vocab"],
    k: int,
    *,
    bias: Float[Tensor, " vocab"] | None = None,
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """The k largest logits of final hidden states, in descending order, and their tokens.

    Example:
        >>> import torch
        >>> values, tokens = top_logits(torch.ones(1, 2), torch.eye(2, 100), 1)
        >>> values.tolist()
        [[1.0]]
    """
    weight = unembed.T
    n = max(64, WIDEN * k)
    if n >= len(weight) or not bool(torch.isfinite(hidden).all()):
        return full_top_logits(hidden, unembed, k, bias=bias)
    dtype = ONE_ROW if len(hidden) == 1 else ROWS
    copies = _ROUGH.setdefault(unembed, {})
    rough = copies.get(dtype)
    if rough is None or rough.made_from != _stamp(weight):
        rough = copies[dtype] = Rough.of(weight, dtype)
    logits = functional.linear(hidden.to(dtype), rough.weight)
    if bias is None:
        listed = logits.topk(n)
        # r + |r| 2^-8 grows with r, so the last listed logit bounds all logits off the list.
        size = listed.values[:, -1].float()
    else:
        size = torch.maximum(logits.amax(1), -logits.amin(1)).float()
        logits = logits.float() + bias
        listed = logits.topk(n)
    exact = einsum(hidden, weight[listed.indices], "b d, b n d -> b n")
    if bias is not None:
        exact = exact + bias[listed.indices]
    top = exact.topk(k)
    values, tokens = top.values, listed.indices.gather(1, top.indices)
    # An upper bound on the exact logits of all tokens off the list.
    ceiling = listed.values[:, -1].float() + rough.bound(hidden, size)
    # Not `>=`: values beyond fp16's range give a NaN bound, which must count as unproven.
    unproven = (~(ceiling < values[:, -1])).nonzero()[:, 0]
    if len(unproven):
        full = full_top_logits(hidden[unproven], unembed, k, bias=bias)
        values[unproven], tokens[unproven] = full
    return values, tokens


def full_top_logits(
    hidden: Float[Tensor, "batch d_model"],
    unembed: Float[Tensor, "d_model vocab"],
    k: int,
    *,
    bias: Float[Tensor, " vocab"] | None = None,
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """As `top_logits`, by the full product, whose logits stay in the parts that `linear` makes."""
    logits = linear_in_parts(hidden, unembed.T)
    if bias is not None:
        logits = logits + bias.view(logits.shape[1:])
    return _largest(logits, k)


def largest(
    x: Float[Tensor, "batch n"], k: int
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """The k largest values of each row, in descending order, and their places: `topk` over the k
    blocks with the largest maxima, which hold them all; for a large vocabulary in half the time.

    Example:
        >>> values, places = largest(torch.arange(4096.0)[None], 2)
        >>> places.tolist()
        [[4095, 4094]]
    """
    return _largest(x[:, None], k)


def _largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`largest` of `[batch, part, width]`, the parts of a row after one another."""
    size = math.gcd(x.shape[2], BLOCK)
    blocks = x.unflatten(2, (-1, size))
    parts, each = blocks.shape[1:3]
    if x.is_cuda or size < BLOCK or parts * each <= k:
        top = x.flatten(1).topk(k)
        return top.values, top.indices
    best = blocks.amax(3).flatten(1).topk(k).indices
    rows = torch.arange(len(x), device=x.device)[:, None]
    top = blocks[rows, best // each, best % each].flatten(1).topk(k)
    return top.values, best.gather(1, top.indices // size) * size + top.indices % size


def _stamp(weight: Tensor) -> tuple[int, int]:
    return weight.data_ptr(), weight._version
