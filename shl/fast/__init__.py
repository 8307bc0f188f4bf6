"""What makes each of TransformerLens's engines fast, and the key-value cache of both.

A HookedTransformer gets faster classes for a CPU (`attention`, `blocks`); `load_model(...,
fast=False)` keeps TransformerLens's own, and results agree up to rounding. A TransformerBridge gets
transformers' own attention (`bridge`). `attention` and `blocks` need TransformerLens 3.9.
"""

from shl.fast.bridge import Bridge
from shl.fast.hooked import is_fast, is_hooked, read_only
from shl.fast.kv_cache import KVCache, explicit_positions
from shl.fast.linear import onednn_linear
from shl.fast.topk import (
    full_top_logits,
    largest,
    plain_unembedding,
    shortlist_applies,
    top_logits,
)

__all__ = [
    "Bridge",
    "KVCache",
    "explicit_positions",
    "full_top_logits",
    "is_fast",
    "is_hooked",
    "largest",
    "onednn_linear",
    "plain_unembedding",
    "read_only",
    "shortlist_applies",
    "top_logits",
]
