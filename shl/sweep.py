"""One pass over vocabulary chunks: softmax statistics of h W without a `[tok, vocab]` tensor."""

from dataclasses import dataclass

import torch
from torch import Tensor

from shl.linear import linear
from shl.shapes import Bool, Float, Hidden, PerToken, Unembed

# Above this exp(ubar - u) of a single word leaves fp32's safe range; such rows, far from the
# reference, take the logsumexp form, whose error is relative to the logits and small there.
LARGE = 40.0


@dataclass(frozen=True)
class Sweep:
    """What one pass over the vocabulary leaves, per token."""

    lse: PerToken  # F(h)
    mean_w: Hidden  # A = E_p[W]
    kl: PerToken | None = None
    grad_kl: Hidden | None = None  # Cov_p[W] delta


def chunk(tokens: int, vocab: int) -> int:
    """Words per chunk: a function of the shape alone, so results repeat bit for bit. A chunk of
    logits takes 4 MB: larger ones leave the cache, and with smaller ones threads wait for each
    other more often, which a busy neighbour makes long."""
    return max(1, min(vocab, max(512, (1 << 20) // max(tokens, 1))))


class _Workspace:
    """Buffers for one chunk, allocated once per sweep: fresh pages cost more than the sums."""

    def __init__(self, count: int, tok: int, words: int, device: torch.device) -> None:
        self.buffers = [torch.empty(tok * words, device=device) for _ in range(count)]
        self.tok = tok

    def take(self, k: int, words: int) -> Tensor:
        return self.buffers[k][: self.tok * words].view(self.tok, words)


def _logits(h: Tensor, w: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    torch.mm(h, w, out=out)
    return out if bias is None else out.add_(bias.float())


def sweep(
    h: Hidden,
    delta: Hidden | None,
    unembed: Unembed,
    bias: Float[Tensor, " vocab"] | None,
    *,
    mean_w: Hidden | None = None,
) -> Sweep:
    """Online softmax statistics of h W over chunks of words; with `delta`, of u = delta W too.

    Two matrix products without `delta`, four with it, three if A is known already (`mean_w`).

    Example:
        >>> import torch
        >>> round(float(sweep(torch.zeros(1, 2), None, torch.ones(2, 8), None).lse.exp()), 4)
        8.0
    """
    tok, d = h.shape
    vocab = unembed.shape[1]
    h = h.float()
    delta = None if delta is None else delta.float()
    step = chunk(tok, vocab)
    space = _Workspace(1 if delta is None else 3, tok, step, h.device)
    top = h.new_full((tok, 1), -torch.inf)
    total = h.new_zeros(tok, 1)
    known, mean_w = mean_w, h.new_zeros(tok, d)
    # Where the values are known, some rows' gradients are wanted: W streams by once for both
    # products, by the faster of two libraries.
    both = None if known is None or delta is None else torch.cat([h, delta])
    # u is taken about its mean over the first chunk, so that what all words share cancels before
    # it is summed.
    centre = h.new_zeros(tok, 1)
    shift = h.new_zeros(tok, 1)  # the running mean of u - centre, around which expm1 is exact
    excess = h.new_zeros(tok, 1)  # sum of e * expm1(shift - u)
    mean_uw = h.new_zeros(tok, d)  # sum of e * u * W
    far: Bool[Tensor, " tok"] = torch.zeros(tok, dtype=torch.bool, device=h.device)
    for start in range(0, vocab, step):
        w = unembed[:, start : start + step].float()
        words = w.shape[1]
        part = None if bias is None else bias[start : start + step]
        if both is None:
            z = _logits(h, w, part, space.take(0, words))
        else:
            z, u = linear(both, w.T).split(tok)
            z = z if part is None else z.add_(part.float())
        new_top = torch.maximum(top, z.amax(1, keepdim=True))
        rescale = (top - new_top).exp()
        e = z.sub_(new_top).exp_()
        top = new_top
        chunk_total = e.sum(1, keepdim=True)
        before = total * rescale
        total = before + chunk_total
        if known is None:
            mean_w.mul_(rescale).add_(linear(e, w, deep=True))
        if delta is None:
            continue
        if both is None:
            u = torch.mm(delta, w, out=space.take(1, words))
        eu = space.take(2, words)
        if start == 0:
            centre = torch.mul(e, u, out=eu).sum(1, keepdim=True) / total
        torch.mul(e, u.sub_(centre), out=eu)
        chunk_first = eu.sum(1, keepdim=True)
        mean_uw.mul_(rescale).add_(linear(eu, w, deep=True))
        # The shift moves to the running mean before this chunk's words are added: the earlier
        # ones' excess is never negative about their own mean, so nothing large cancels.
        move = (chunk_first - shift * chunk_total) / total
        shift = shift + move
        if start > 0:
            far |= move[:, 0] > LARGE
            move = move.clamp(max=LARGE)
            excess = move.exp() * (excess * rescale) + move.expm1() * before
        u = torch.sub(shift, u, out=u)
        above = u.amax(1) > LARGE
        if bool(above.any()):
            far |= above
            u.clamp_(max=LARGE)
        excess = excess + u.expm1_().mul_(e).sum(1, keepdim=True)
    lse = (top + total.log())[:, 0]
    mean_w = mean_w / total if known is None else known
    if delta is None:
        return Sweep(lse, mean_w)
    kl = torch.log1p(excess / total)[:, 0]
    if bool(far.any()):
        rows = far.nonzero()[:, 0]
        ref_lse = logsumexp(h[rows] - delta[rows], unembed, bias)
        kl[rows] = (centre + shift)[rows, 0] - lse[rows] + ref_lse
    return Sweep(lse, mean_w, kl, mean_uw / total - shift * mean_w)


def logsumexp(
    h: Hidden,
    unembed: Unembed,
    bias: Float[Tensor, " vocab"] | None,
    *,
    scoring: bool = False,
) -> PerToken:
    """F(h) alone: one matrix product.

    Args:
        scoring: take the faster product, up to twice as far off (some 1e-5 nats) and not bit for
            bit what `sweep` gives: not for a difference of two values that are nearly equal.

    Example:
        >>> import torch
        >>> round(float(logsumexp(torch.zeros(1, 2), torch.ones(2, 8), None).exp()), 4)
        8.0
    """
    tok, vocab = len(h), unembed.shape[1]
    h = h.float()
    step = chunk(tok, vocab)
    space = _Workspace(1, tok, step, h.device)
    top = h.new_full((tok, 1), -torch.inf)
    total = h.new_zeros(tok, 1)
    for start in range(0, vocab, step):
        w = unembed[:, start : start + step].float()
        part = None if bias is None else bias[start : start + step]
        if scoring:
            z = linear(h, w.T, None if part is None else part.float())
        else:
            z = _logits(h, w, part, space.take(0, w.shape[1]))
        new_top = torch.maximum(top, z.amax(1, keepdim=True))
        chunk_total = z.sub_(new_top).exp_().sum(1, keepdim=True)
        total = total * (top - new_top).exp() + chunk_total
        top = new_top
    return (top + total.log())[:, 0]
