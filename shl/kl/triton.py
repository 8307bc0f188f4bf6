"""The elementwise part of the sweep as a Triton kernel, for GPUs.

Matrix products stay with cuBLAS: a single kernel would need a `[64, d_model]` fp32 accumulator,
which for d_model 2560 does not fit into a streaming multiprocessor. Per chunk of the vocabulary two
products give logits z = h W and u = delta W in fp32. The kernel reads both, updates the online
statistics of each row, and writes e = exp(z - top) and e u in the weights' dtype for the two
gradient products. Without delta everything that involves u is omitted.
"""

import torch
import triton
import triton.language as tl

from shl.kl.sweep import LARGE, Bias, Sweep, logsumexp, product
from shl.utils.shapes import Hidden, Unembed

BLOCK = 1024
"""Tokens of the vocabulary per iteration of a row's program."""
CHUNK_BYTES = 1 << 28
"""Workspace for z and u of one chunk, fp32."""


@triton.jit
def _row(  # noqa: ANN202
    z_ptr,  # noqa: ANN001
    u_ptr,  # noqa: ANN001
    e_ptr,  # noqa: ANN001
    eu_ptr,  # noqa: ANN001
    state_ptr,  # noqa: ANN001
    width,  # noqa: ANN001
    first: tl.constexpr,
    divergence: tl.constexpr,
    large: tl.constexpr,
    block: tl.constexpr,
):
    """Process a row of a chunk; the state is top, total, centre, shift, excess, far, rescale."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * width
    u_ptr += row * width
    e_ptr += row * width
    eu_ptr += row * width
    state_ptr += row * 7
    top = tl.load(state_ptr)
    total = tl.load(state_ptr + 1)
    centre = tl.load(state_ptr + 2)
    shift = tl.load(state_ptr + 3)
    excess = tl.load(state_ptr + 4)
    far = tl.load(state_ptr + 5)
    at = tl.arange(0, block)

    best = tl.full([block], float("-inf"), tl.float32)
    for start in range(0, width, block):
        inside = start + at < width
        best = tl.maximum(best, tl.load(z_ptr + start + at, mask=inside, other=float("-inf")))
    new_top = tl.maximum(top, tl.max(best, 0))
    rescale = tl.exp(top - new_top)

    if first and divergence:
        # Subtract a common offset before summation, as in `sweep`.
        weights = tl.zeros([block], tl.float32)
        shared = tl.zeros([block], tl.float32)
        for start in range(0, width, block):
            inside = start + at < width
            z = tl.load(z_ptr + start + at, mask=inside, other=float("-inf"))
            u = tl.load(u_ptr + start + at, mask=inside, other=0.0)
            e = tl.exp(z - new_top)
            weights += e
            shared += e * u
        centre = tl.sum(shared, 0) / tl.sum(weights, 0)

    sums = tl.zeros([block], tl.float32)
    firsts = tl.zeros([block], tl.float32)
    for start in range(0, width, block):
        inside = start + at < width
        z = tl.load(z_ptr + start + at, mask=inside, other=float("-inf"))
        e = tl.exp(z - new_top)
        sums += e
        tl.store(e_ptr + start + at, e.to(e_ptr.dtype.element_ty), mask=inside)
        if divergence:
            u = tl.load(u_ptr + start + at, mask=inside, other=0.0) - centre
            eu = e * u
            firsts += eu
            tl.store(eu_ptr + start + at, eu.to(eu_ptr.dtype.element_ty), mask=inside)
    chunk_total = tl.sum(sums, 0)
    before = total * rescale
    total = before + chunk_total
    tl.store(state_ptr, new_top)
    tl.store(state_ptr + 1, total)
    tl.store(state_ptr + 6, rescale)
    if divergence:
        # Update the shift to the running mean before adding this chunk's tokens, as in `sweep`.
        move = (tl.sum(firsts, 0) - shift * chunk_total) / total
        shift += move
        if not first:
            far = tl.maximum(far, tl.where(move > large, 1.0, 0.0))
            move = tl.minimum(move, large)
            # Kahan's expm1: the rounding errors of exp(x) - 1 and log(exp(x)) near 0 cancel.
            grown = tl.exp(move)
            close = (grown != 1.0) & (tl.abs(move) < 0.5)
            more = tl.where(
                close, (grown - 1.0) * move / tl.log(tl.where(close, grown, 2.0)), grown - 1.0
            )
            more = tl.where(grown == 1.0, move, more)
            excess = grown * (excess * rescale) + more * before

        added = tl.zeros([block], tl.float32)
        above = tl.zeros([block], tl.float32)
        for start in range(0, width, block):
            inside = start + at < width
            z = tl.load(z_ptr + start + at, mask=inside, other=float("-inf"))
            u = tl.load(u_ptr + start + at, mask=inside, other=0.0) - centre
            off = shift - u
            above = tl.maximum(above, tl.where(inside & (off > large), 1.0, 0.0))
            off = tl.minimum(off, large)
            w = tl.exp(off)
            near = (w != 1.0) & (tl.abs(off) < 0.5)
            minus = tl.where(near, (w - 1.0) * off / tl.log(tl.where(near, w, 2.0)), w - 1.0)
            minus = tl.where(w == 1.0, off, minus)
            added += tl.where(inside, minus * tl.exp(z - new_top), 0.0)
        tl.store(state_ptr + 2, centre)
        tl.store(state_ptr + 3, shift)
        tl.store(state_ptr + 4, excess + tl.sum(added, 0))
        tl.store(state_ptr + 5, tl.maximum(far, tl.max(above, 0)))


def fused_sweep(
    h: Hidden, delta: Hidden | None, unembed: Unembed, bias: Bias, mean_w: Hidden | None = None
) -> Sweep:
    """`shl.kl.sweep.sweep` through the Triton kernel, with the same arguments.

    Matrix products take factors in the weights' dtype and return fp32; everything else is fp32.

    Example:
        >>> h, w = torch.ones(1, 2), torch.ones(2, 8)
        >>> fused_sweep(h, 0 * h, w, None).kl  # doctest: +SKIP
        tensor([0.])
    """
    tok, d = h.shape
    vocab, dtype = unembed.shape[1], unembed.dtype
    h16, delta16 = h.to(dtype), None if delta is None else delta.to(dtype)
    step = max(BLOCK, min(vocab, CHUNK_BYTES // (8 * max(tok, 1)) // BLOCK * BLOCK))
    buffers = [h.new_empty(tok * step, dtype=torch.float32) for _ in range(2)]
    outs = [h.new_empty(tok * step, dtype=dtype) for _ in range(2)]
    state = torch.zeros(tok, 7, device=h.device)
    state[:, 0] = -torch.inf
    known, mean_w = mean_w, torch.zeros(tok, d, device=h.device)
    mean_uw = torch.zeros(tok, d, device=h.device)
    for start in range(0, vocab, step):
        w = unembed[:, start : start + step]
        width = w.shape[1]
        z, u, e, eu = (b[: tok * width].view(tok, width) for b in (*buffers, *outs))
        product(h16, w, z)
        if delta16 is not None:
            product(delta16, w, u)
        if bias is not None:
            z += bias[start : start + step].float()
        with torch.cuda.device_of(z):  # Triton launches on the current device
            _row[(tok,)](
                *(z, u, e, eu, state, width),
                first=start == 0,
                divergence=delta is not None,
                large=LARGE,
                block=BLOCK,
            )
        rescale = state[:, 6:]
        if known is None:
            mean_w.mul_(rescale).add_(product(e, w.T))
        if delta is not None:
            mean_uw.mul_(rescale).add_(product(eu, w.T))
    top, total, centre, shift, excess, far, _ = state.unbind(1)
    lse = top + total.log()
    mean_w = mean_w / total[:, None] if known is None else known
    if delta is None:
        return Sweep(lse, mean_w)
    kl = torch.log1p(excess / total)
    rows = far.nonzero()[:, 0]
    if len(rows):
        ref_lse = logsumexp(h[rows].float() - delta[rows].float(), unembed, bias)
        kl[rows] = (centre + shift)[rows] - lse[rows] + ref_lse
    return Sweep(lse, mean_w, kl, mean_uw / total[:, None] - shift[:, None] * mean_w)
