"""One training step of heal: forward, barrier and backward of a batch, measured.

    loss = mean over completions of [ mean_t NLL_t + lam * relu(D - tau) ]

The two terms' gradients are taken apart at the final hidden states, where both are already
formed, and go through the model together.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from shl.config import HealConfig
from shl.finite import NotFiniteError, require_finite
from shl.generate import Completion
from shl.halving import halve
from shl.kl import aggregate, differentiable_nll, forward_kl_and_nll, reverse_kl_and_nll
from shl.lora import Adapter, singular_value_penalty
from shl.scores import completion_hidden
from shl.shapes import Hidden, PerToken
from shl.sites import readout

Reference = tuple[Hidden, PerToken]
"""The reference's hidden states at a batch's completion positions, and their log-sum-exp."""


@dataclass(frozen=True)
class HealStep:
    """One optimiser step, measured before its update; means over the batch's completions."""

    epoch: int
    step: int
    nll: float  # nats per token
    d: float  # nats
    lam: float
    fired: float  # share of completions with D > tau
    tokens_over: float  # share of tokens with divergence > tau
    grad_nll: float  # 2-norm of the gradient at the final hidden states
    grad_barrier: float  # likewise, lam included
    grad_adapter: float  # 2-norm over A and B, before clipping


@dataclass(frozen=True)
class Terms:
    """What a batch's forward and backward gave, before clipping."""

    nll: float
    d: float
    fired: float
    tokens_over: float
    grad_nll: float
    grad_barrier: float


def backward(
    model: HookedTransformer,
    adapter: Adapter,
    batch: Sequence[Completion],
    reference: Reference | None,
    config: HealConfig,
    lam: float,
    *,
    lazy: bool,
    rows: int,
) -> tuple[Terms, int]:
    """Give the adapter the loss's gradient, `rows` completions at a time: fewer if the GPU's
    memory is too small.

    Returns:
        The terms, and how many completions fitted at a time.

    Raises:
        NotFiniteError: hidden states or losses that are not finite, with the site.
        ShlError: one completion alone does not fit.
    """
    while True:
        for parameter in adapter.parameters():
            parameter.grad = None
        try:
            found = [
                _part(
                    model,
                    batch,
                    range(start, min(start + rows, len(batch))),
                    reference,
                    config,
                    lam,
                    lazy,
                )
                for start in range(0, len(batch), rows)
            ]
            break
        except torch.OutOfMemoryError:
            # Halved outside the handler, whose traceback keeps the failed tensors alive.
            pass
        rows = halve(min(rows, len(batch)), "training")
    if config.sv_penalty > 0:
        (config.sv_penalty * singular_value_penalty(adapter)).backward()
    terms = _joined(found)
    if not math.isfinite(terms.nll + terms.d):
        raise NotFiniteError(f"the loss has NLL {terms.nll} and D {terms.d}, both must be finite.")
    return terms, rows


def _part(
    model: HookedTransformer,
    whole: Sequence[Completion],
    rows: range,
    reference: Reference | None,
    config: HealConfig,
    lam: float,
    lazy: bool,
) -> tuple[float, float, Terms]:
    """Some rows of a batch: their share of its completions and of its tokens, and their terms."""
    batch = [whole[i] for i in rows]
    share = len(batch) / len(whole)
    before, width, total = (
        sum(len(c.tokens) for c in part) for part in (whole[: rows.start], batch, whole)
    )
    hidden = completion_hidden(model, batch)
    require_finite(
        hidden.detach(),
        "a hidden state",
        model,
        lambda: [[*c.prompt_tokens, *c.tokens] for c in batch],
    )
    targets = torch.tensor([t for c in batch for t in c.tokens], device=hidden.device)
    sizes = [len(c.tokens) for c in batch]
    leaf = hidden.detach().requires_grad_(True)
    fire = torch.zeros(len(batch), device=hidden.device)
    d = torch.zeros(len(batch), device=hidden.device)
    kl = torch.zeros(len(targets), device=hidden.device)
    if reference is None:
        nll = differentiable_nll(leaf, model.W_U, targets, **readout(model))
    else:
        states, ref_lse = (x[before : before + width] for x in reference)
        if config.divergence == "kl_fwd":
            kl, nll = forward_kl_and_nll(leaf, states, model.W_U, targets, **readout(model))
        else:
            kl, nll = reverse_kl_and_nll(
                leaf,
                states,
                model.W_U,
                targets,
                **readout(model),
                ref_lse=ref_lse if lazy else None,
                lazy=lazy,
            )
        d = torch.stack([aggregate(part, config.aggregate) for part in kl.split(sizes)])
        fire = (d > config.tau).float()
    nll_term = torch.stack([part.mean() for part in nll.split(sizes)]).mean()
    (grad_nll,) = torch.autograd.grad(nll_term, leaf, retain_graph=True)
    grad_barrier = torch.zeros_like(grad_nll)
    if reference is not None:
        barrier = lam * torch.relu(d - config.tau).mean()
        (grad_barrier,) = torch.autograd.grad(barrier, leaf)
    hidden.backward((grad_nll + grad_barrier) * share if share < 1 else grad_nll + grad_barrier)
    terms = Terms(
        nll=float(nll_term.detach()),
        d=float(d.detach().mean()),
        fired=float(fire.mean()),
        tokens_over=float((kl.detach() > config.tau).float().mean()),
        grad_nll=share * float(grad_nll.norm()),
        grad_barrier=share * float(grad_barrier.norm()),
    )
    return share, width / total, terms


def _joined(parts: Sequence[tuple[float, float, Terms]]) -> Terms:
    """Means over completions (over tokens, for the share of tokens); norms over all of them."""
    if len(parts) == 1:
        return parts[0][2]
    return Terms(
        nll=sum(share * t.nll for share, _, t in parts),
        d=sum(share * t.d for share, _, t in parts),
        fired=sum(share * t.fired for share, _, t in parts),
        tokens_over=sum(tokens * t.tokens_over for _, tokens, t in parts),
        grad_nll=sum(t.grad_nll**2 for *_, t in parts) ** 0.5,
        grad_barrier=sum(t.grad_barrier**2 for *_, t in parts) ** 0.5,
    )


def gradient_norm(adapter: Adapter, limit: float) -> float:
    """Scale the gradient of A and B down to a 2-norm of `limit`; the norm before that.

    Raises:
        NotFiniteError: a gradient that is not finite, with its site.
    """
    gradients = [p.grad for p in adapter.parameters() if p.grad is not None]
    total = torch.nn.utils.get_total_norm(gradients)
    norm = float(total)
    if math.isfinite(norm):
        torch.nn.utils.clip_grads_with_norm_(adapter.parameters(), limit, total)
        return norm
    for site in adapter.sites:
        for factor, table in (("A", adapter.down), ("B", adapter.up)):
            grad: Tensor | None = table[site.name].grad
            if grad is not None and not bool(torch.isfinite(grad).all()):
                raise NotFiniteError(
                    f"the gradient of {factor} at {site.name} is not finite, it must be."
                )
    raise NotFiniteError(f"the gradient's norm is {norm}, it must be finite.")
