"""A pass over vocabulary chunks: softmax statistics of h W without a `[tok, vocab]` tensor."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from shl.fast import linear, onednn_linear
from shl.utils.shapes import Bool, Float, Hidden, PerToken, Unembed

Bias = Float[Tensor, " vocab"] | None
WIDTH = 1024
"""Tokens of the vocabulary per product on a CPU. MKL is up to twice as fast at a batch of such
products, one per thread, as at one wide product that all threads share."""
CPU_CHUNK, GPU_CHUNK = 1 << 20, 1 << 25
"""Logits of a chunk. On a CPU larger chunks exceed its cache, and smaller ones synchronise threads
more often; on a GPU a chunk is a few kernels, each of which must be large."""


def chunk_size(tokens: int, vocab: int, *, gpu: bool = False) -> int:
    """Tokens of the vocabulary per chunk, a function of the shape and the kind of device alone, so
    that results are reproducible."""
    logits = GPU_CHUNK if gpu else CPU_CHUNK
    return max(1, min(vocab, max(512, logits // max(tokens, 1))))


def chunks(tokens: int, vocab: int, *, gpu: bool = False) -> Iterator[tuple[int, int, int]]:
    """(start, count, width) of chunks, each with `count` times `width` tokens of the vocabulary.

    Example:
        >>> list(chunks(512, 5000)), list(chunks(512, 5000, gpu=True))
        ([(0, 2, 1024), (2048, 2, 1024), (4096, 1, 904)], [(0, 1, 5000)])
    """
    size = chunk_size(tokens, vocab, gpu=gpu)
    width = size if gpu else min(size, WIDTH)
    most = size // width
    start = 0
    while start < vocab:
        count = min(most, (vocab - start) // width)
        yield (start, count, width) if count else (start, 1, vocab - start)
        start += count * width or vocab - start


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """`a @ b` in fp32. On a GPU with a `b` of 16 bits, `a` is rounded to its dtype and the products
    are summed in fp32.

    Example:
        >>> product(torch.ones(1, 2), torch.ones(2, 1, dtype=torch.bfloat16))
        tensor([[2.]])
    """
    if not b.is_cuda or b.dtype.itemsize != 2:
        return torch.mm(a.float(), b.float(), out=out)
    return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32, out=out)


class Chunk:
    """A part of the unembedding, `[count * width, d]`, fp32 on a CPU, and its bias,
    `[count, width]`, fp32."""

    def __init__(self, unembed: Tensor, bias: Bias, start: int, count: int, width: int) -> None:
        end = start + count * width
        weight = unembed.T[start:end]
        self.weight = weight if weight.is_cuda else weight.float()
        self.bias = None if bias is None else bias[start:end].float().view(count, width)
        self.shape = (count, width)

    def logits(self, rows: Tensor, buffer: Tensor) -> Tensor:
        """`[rows, count, width]` without bias, a view into `buffer`."""
        count, width = self.shape
        out = buffer[: count * len(rows) * width].view(count, len(rows), width)
        if self.weight.is_cuda:
            return product(rows, self.weight.T, out[0])[:, None]
        parts = self.weight.unflatten(0, self.shape).mT
        return torch.bmm(rows.expand(count, -1, -1), parts, out=out).transpose(0, 1)

    def fast_logits(self, rows: Tensor, buffer: Tensor) -> Tensor:
        """As `logits`, by oneDNN where that is faster, with up to twice the rounding error."""
        if self.weight.is_cuda or not linear.ONEDNN_FASTER:
            return self.logits(rows, buffer)
        return onednn_linear(rows, self.weight).unflatten(1, self.shape)

    def weighted(self, e: Tensor) -> Tensor:
        """e W, from `[tok, count, width]` to `[tok, d]`."""
        if self.weight.is_cuda:
            return product(e.flatten(1), self.weight)
        return onednn_linear(e.flatten(1), self.weight.T)

    def view(self, buffer: Tensor, tok: int) -> Tensor:
        """A contiguous `[tok, count, width]` view of `buffer`."""
        count, width = self.shape
        return buffer[: tok * count * width].view(tok, count, width)


def buffer_for(tok: int, vocab: int, like: Tensor) -> Tensor:
    """Memory for a chunk, allocated once per sweep, because allocation costs more than the sums."""
    found = chunks(tok, vocab, gpu=like.is_cuda)
    return like.new_empty(len(like) * max(count * width for _, count, width in found))


# For larger ubar - u, exp(ubar - u) exceeds fp32's safe range. Such rows are far from the
# reference and use the logsumexp form, whose error is relative to the logits and small there.
LARGE = 40.0


@dataclass(frozen=True)
class Sweep:
    """The result of one pass over the vocabulary, per token."""

    lse: PerToken  # F(h)
    mean_w: Hidden  # A = E_p[W]
    kl: PerToken | None = None
    grad_kl: Hidden | None = None  # Cov_p[W] delta


def _largest(z: Tensor) -> Tensor:
    return z.amax(2).amax(1, keepdim=True)


def _sum(z: Tensor) -> Tensor:
    return z.sum(2).sum(1, keepdim=True)


def sweep(
    h: Hidden, delta: Hidden | None, unembed: Unembed, bias: Bias, mean_w: Hidden | None = None
) -> Sweep:
    """Online softmax statistics of h W, and with `delta` of u = delta W, over vocabulary chunks.

    Takes two matrix products without `delta` and four with it. With `mean_w` (A, from an earlier
    sweep) it takes three and computes the KL's gradient only.

    Example:
        >>> import torch
        >>> round(float(sweep(torch.zeros(1, 2), None, torch.ones(2, 8), None).lse.exp()), 4)
        8.0
    """
    tok, d = h.shape
    vocab = unembed.shape[1]
    h = h.float()
    delta = None if delta is None else delta.float()
    rows = h if delta is None else torch.cat([h, delta])
    factor = rows.to(unembed.dtype) if h.is_cuda else rows
    buffer, buffer_e, buffer_eu = (buffer_for(tok, vocab, like) for like in (rows, h, rows[tok:]))
    top = h.new_full((tok, 1), -torch.inf)
    total = h.new_zeros(tok, 1)
    known, mean_w = mean_w, h.new_zeros(tok, d)
    # The mean of u over the first chunk is subtracted from u, so that a common offset cancels
    # before summation.
    centre = h.new_zeros(tok, 1)
    shift = h.new_zeros(tok, 1)  # the running mean of u - centre, around which expm1 is exact
    excess = h.new_zeros(tok, 1)  # sum of e * expm1(shift - u)
    mean_uw = h.new_zeros(tok, d)  # sum of e * u * W
    far: Bool[Tensor, " tok"] = torch.zeros(tok, dtype=torch.bool, device=h.device)
    for start, count, width in chunks(tok, vocab, gpu=h.is_cuda):
        part = Chunk(unembed, bias, start, count, width)
        zu = part.logits(factor, buffer) if known is None else part.fast_logits(factor, buffer)
        z = zu[:tok] if part.bias is None else zu[:tok].add_(part.bias)
        new_top = torch.maximum(top, _largest(z))
        rescale = (top - new_top).exp()
        e = torch.sub(z, new_top[..., None], out=part.view(buffer_e, tok)).exp_()
        top = new_top
        chunk_total = _sum(e)
        before = total * rescale
        total = before + chunk_total
        if known is None:
            mean_w.mul_(rescale).add_(part.weighted(e))
        if delta is None:
            continue
        u, eu = zu[tok:], part.view(buffer_eu, tok)
        if start == 0:
            centre = _sum(torch.mul(e, u, out=eu)) / total
        torch.mul(e, u.sub_(centre[..., None]), out=eu)
        chunk_first = _sum(eu)
        mean_uw.mul_(rescale).add_(part.weighted(eu))
        # Update the shift to the running mean before adding this chunk's tokens. The excess of
        # earlier tokens about their mean is not negative, so there is no large cancellation.
        move = (chunk_first - shift * chunk_total) / total
        shift = shift + move
        if known is not None:
            continue  # the caller has the KL already
        if start > 0:
            far |= move[:, 0] > LARGE
            move = move.clamp(max=LARGE)
            excess = move.exp() * (excess * rescale) + move.expm1() * before
        u = torch.sub(shift[..., None], u, out=u)
        above = _largest(u)[:, 0] > LARGE
        if bool(above.any()):
            far |= above
            u.clamp_(max=LARGE)
        excess = excess + _sum(u.expm1_().mul_(e))
    lse = (top + total.log())[:, 0]
    mean_w = mean_w / total if known is None else known
    if delta is None:
        return Sweep(lse, mean_w)
    grad_kl = mean_uw / total - shift * mean_w
    if known is not None:
        return Sweep(lse, mean_w, grad_kl=grad_kl)
    kl = torch.log1p(excess / total)[:, 0]
    if bool(far.any()):
        rows = far.nonzero()[:, 0]
        ref_lse = logsumexp(h[rows] - delta[rows], unembed, bias)
        kl[rows] = (centre + shift)[rows, 0] - lse[rows] + ref_lse
    return Sweep(lse, mean_w, kl, grad_kl)


def logsumexp(h: Hidden, unembed: Unembed, bias: Bias, *, scoring: bool = False) -> PerToken:
    """F(h) = logsumexp(h W), by one matrix product.

    Args:
        scoring: use the faster product, with up to twice the error (about 1e-5 nats) and not
            bit-identical to `sweep`; unsuitable for differences of nearly equal values.

    Example:
        >>> import torch
        >>> round(float(logsumexp(torch.zeros(1, 2), torch.ones(2, 8), None).exp()), 4)
        8.0
    """
    return logsumexp_and_max(h, unembed, bias, scoring=scoring)[0]


def logsumexp_and_max(
    h: Hidden, unembed: Unembed, bias: Bias, *, scoring: bool = False
) -> tuple[PerToken, PerToken]:
    """`logsumexp` and the largest logit, by the same product."""
    tok, vocab = len(h), unembed.shape[1]
    h = h.float()
    buffer = buffer_for(tok, vocab, h)
    top = h.new_full((tok, 1), -torch.inf)
    total = h.new_zeros(tok, 1)
    for start, count, width in chunks(tok, vocab, gpu=h.is_cuda):
        part = Chunk(unembed, bias, start, count, width)
        z = part.fast_logits(h, buffer) if scoring else part.logits(h, buffer)
        z = z if part.bias is None else z.add_(part.bias)
        new_top = torch.maximum(top, _largest(z))
        chunk_total = _sum(z.sub_(new_top[..., None]).exp_())
        total = total * (top - new_top).exp() + chunk_total
        top = new_top
    return (top + total.log())[:, 0], top[:, 0]
