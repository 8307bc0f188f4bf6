"""The divergence the plain way, with full logits: for tests, benches and soft-capped models."""

import warnings

import torch
from torch import Tensor

from shl.shapes import Float, Hidden, PerToken, Targets, Unembed


def naive_kl_and_nll(
    student: Hidden,
    ref: Hidden,
    unembed: Unembed,
    targets: Targets,
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    reverse: bool = True,
    soft_cap: float = 0.0,
) -> tuple[PerToken, PerToken]:
    """The plain reference: two full logits, two log-softmaxes, in the inputs' own dtype.

    For tests, benches, and models whose logits are soft-capped after the unembedding.
    """
    log_p = full_log_probs(student, unembed, bias, soft_cap)
    log_q = full_log_probs(ref, unembed, bias, soft_cap)
    if reverse:
        kl = (log_p.exp() * (log_p - log_q)).sum(1)
    else:
        kl = (log_q.exp() * (log_q - log_p)).sum(1)
    return kl, -log_p.gather(1, targets[:, None])[:, 0]


def full_log_probs(
    h: Tensor, unembed: Tensor, bias: Tensor | None, soft_cap: float = 0.0
) -> Tensor:
    """Log-probabilities `[tok, vocab]`, capped before the softmax if `soft_cap` is above 0."""
    logits = h @ unembed if bias is None else h @ unembed + bias
    if soft_cap > 0:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    return logits.log_softmax(1)


def say_plain(soft_cap: float) -> None:
    """Warn the caller's caller that full logits are formed."""
    warnings.warn(
        f"the logits are soft-capped at {soft_cap:g}, so they are formed in full: slow, and "
        "[tok, vocab] in memory.",
        stacklevel=3,
    )
