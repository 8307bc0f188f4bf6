"""Prompts into a cache, what they share only once."""

from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from shl.cache import KeyValues
from shl.hooks import handles_on
from shl.shapes import Float, Mask, Tokens
from shl.tokens import pad_left

WORTH = 8
"""A shared prefix of fewer tokens than this is not worth a forward pass of its own."""


def run(
    model: HookedTransformer, tokens: Tokens, mask: Mask, cache: KeyValues
) -> Float[Tensor, "batch pos d_model"]:
    """The residual after the last layer for new tokens, which the cache remembers."""
    return model(tokens, attention_mask=mask, past_kv_cache=cache, stop_at_layer=model.cfg.n_layers)


def prefill(
    model: HookedTransformer, rows: Sequence[Sequence[int]], *, room: int = 0
) -> tuple[Float[Tensor, "batch 1 d_model"], KeyValues]:
    """Run rows of ids: the residual after the last layer at each row's last token, and the cache.

    A prefix that all rows share (a persona, a system turn) is run once, unless somebody's hooks
    expect every row to pass: per-row doses, or hooks placed through TransformerLens.

    Args:
        room: positions to allocate beyond the prompts.

    Example:
        >>> from shl.tiny import tiny_gemma
        >>> residual, cache = prefill(tiny_gemma(), [[2, 9, 7], [2, 8]])
        >>> residual.shape, cache.length
        (torch.Size([2, 1, 32]), 3)
    """
    shared = _shared(model, rows)
    batch = pad_left(model, [row[shared:] for row in rows])
    capacity = shared + batch.tokens.shape[1] + room
    if shared:
        head = torch.tensor([rows[0][:shared]], device=batch.tokens.device)
        once = KeyValues.empty(model, 1, shared)
        run(model, head, torch.ones_like(head), once)
        everyone = torch.zeros(len(rows), dtype=torch.long, device=head.device)
        cache = once.rows(everyone, capacity)
    else:
        cache = KeyValues.empty(model, len(rows), capacity)
    return run(model, batch.tokens, batch.mask, cache)[:, -1:], cache


def _shared(model: HookedTransformer, rows: Sequence[Sequence[int]]) -> int:
    """How many first tokens may be run once for all rows."""
    if len(rows) < 2:
        return 0
    same = takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
    common = min(sum(1 for _ in same), min(map(len, rows)) - 1)
    # Padding then stands between the prefix and the rest, and counts towards a local window.
    window = model.cfg.window_size if model.cfg.use_local_attn else None
    fits = window is None or max(map(len, rows)) <= window
    every_row = any(handle.per_row for handle in handles_on(model)) or any(
        point.fwd_hooks or point.bwd_hooks for point in model.hook_dict.values()
    )
    return common if common >= WORTH and fits and not every_row else 0
