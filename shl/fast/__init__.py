"""Faster classes for a HookedTransformer on a CPU.

`load_model(..., fast=False)` keeps TransformerLens's own classes; results agree up to rounding.
"""

from shl.fast.attention import explicit_positions
from shl.fast.blocks import is_fast, speed_up
from shl.fast.hooked import is_hooked, read_only
from shl.fast.kv_cache import KVCache
from shl.fast.linear import onednn_linear
from shl.fast.topk import shortlist_applies, top_logits

__all__ = [
    "KVCache",
    "explicit_positions",
    "is_fast",
    "is_hooked",
    "onednn_linear",
    "read_only",
    "shortlist_applies",
    "speed_up",
    "top_logits",
]
