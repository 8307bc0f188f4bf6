"""Per-token KL and NLL from final hidden states, without full logits, and their aggregates."""

from shl.kl.divergence import (
    SoftTargets,
    aggregate,
    differentiable_nll,
    forward_kl_and_nll,
    fused,
    log_probs_at,
    nll,
    nll_and_top,
    reverse_kl_and_nll,
    soft_targets,
)
from shl.kl.sweep import logsumexp

__all__ = [
    "SoftTargets",
    "aggregate",
    "differentiable_nll",
    "forward_kl_and_nll",
    "fused",
    "log_probs_at",
    "logsumexp",
    "nll",
    "nll_and_top",
    "reverse_kl_and_nll",
    "soft_targets",
]
