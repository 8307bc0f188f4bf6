"""Scores of completions: NLL, perplexity and divergence of their tokens.

Prompt and padding positions are never unembedded.
"""

from collections.abc import Sequence

import torch

from shl.hooks.handle import running, suspended
from shl.hooks.sites import final_hidden, readout
from shl.kl import nll, reverse_kl_and_nll
from shl.models.generate import Completion
from shl.models.nan_checks import require_finite
from shl.models.tokens import length_batches, pad_left
from shl.utils.errors import in_batches, require
from shl.utils.model import Model
from shl.utils.shapes import Hidden, PerToken


@torch.no_grad()
def base_perplexities(
    model: Model,
    completions: Sequence[Completion],
    *,
    batch_size: int = 16,
    reuse_nll: bool = False,
) -> list[tuple[float, float]]:
    """Perplexity of each completion, and of its last quarter, under base given the prompt.

    All handles are suspended. A completion without tokens has (inf, inf).

    Args:
        reuse_nll: take `Completion.base_nll` where there is one, which is right for the model that
            wrote the completion with its prompt.

    Example:
        >>> from shl.models.generate import generate
        >>> from shl.models.tiny import tiny_gemma
        >>> model = tiny_gemma()
        >>> [(whole, tail)] = base_perplexities(model, generate(model, ["Hello?"]))
        >>> whole > 1
        True
    """
    known = [c.base_nll if reuse_nll and c.base_nll else None for c in completions]
    new = [c for c, losses in zip(completions, known, strict=True) if losses is None]
    with suspended(model):
        scored = iter(token_nll(model, new, batch_size=batch_size))
    scores = []
    for reused in known:
        losses = next(scored) if reused is None else torch.tensor(reused)
        tail = losses[-max(1, len(losses) // 4) :]
        whole_and_tail = (float(losses.mean().exp()), float(tail.mean().exp()))
        scores.append(whole_and_tail if len(losses) else (float("inf"), float("inf")))
    return scores


@torch.no_grad()
def token_nll(
    model: Model, completions: Sequence[Completion], *, batch_size: int = 16
) -> list[torch.Tensor]:
    """NLL per token `[tok]` (nats) of each completion under the model, hooks included."""
    out = [torch.empty(0)] * len(completions)
    nonempty = [i for i, c in enumerate(completions) if c.tokens]
    rows = {i: [*completions[i].prompt_tokens, *completions[i].tokens] for i in nonempty}

    def work(indices: list[int]) -> None:
        chosen = [nonempty[j] for j in indices]
        with running(rows=chosen):
            hidden = completion_hidden(model, [completions[i] for i in chosen])
        targets = torch.cat([torch.tensor(completions[i].tokens) for i in chosen])
        losses = nll(hidden, model.W_U, targets.to(hidden.device), **readout(model))
        require_finite(losses, "a completion's NLL", model, lambda: [rows[i] for i in chosen])
        parts = losses.cpu().split([len(completions[i].tokens) for i in chosen])
        for i, part in zip(chosen, parts, strict=True):
            out[i] = part

    in_batches(length_batches([len(rows[i]) for i in nonempty], batch_size), work, "scoring")
    return out


def completion_hidden(model: Model, completions: Sequence[Completion]) -> torch.Tensor:
    """Hidden states `[tok, d_model]` after the final norm, at the positions that predict the
    completions' tokens, concatenated over completions."""
    tokens, mask = pad_left(model, [[*c.prompt_tokens, *c.tokens] for c in completions])
    with running(prompts=[len(c.prompt_tokens) for c in completions]):
        residual = model(tokens, attention_mask=mask, stop_at_layer=model.cfg.n_layers)
    picked = [residual[i, -len(c.tokens) - 1 : -1] for i, c in enumerate(completions)]
    return final_hidden(model, torch.cat(picked))


@torch.no_grad()
def kl_values(
    model: Model, student: Hidden, ref: Hidden, *, ref_lse: PerToken | None = None
) -> PerToken:
    """KL(student || reference) per token (nats) from final hidden states, without a gradient.

    Args:
        ref_lse: `logsumexp` of the reference's logits, if known; saves one product over the
            vocabulary.
    """
    output = readout(model)
    targets = torch.zeros(len(student), dtype=torch.long, device=student.device)
    lazy = output["soft_cap"] == 0 and ref_lse is not None
    if lazy:
        output |= {"ref_lse": ref_lse, "lazy": True}
    return reverse_kl_and_nll(student, ref, model.W_U, targets, **output)[0]


@torch.no_grad()
def token_divergence(
    model: Model, completion: Completion, reference: Completion | None = None
) -> PerToken:
    """KL(hooked model || base) per token of one completion, in nats.

    Args:
        reference: the same completion with another prompt for base, such as one without the persona
            (`shl.models.generate.without_persona`).

    Raises:
        ShlError: the tokens of `reference` differ from those of `completion`.

    Example:
        >>> from shl.models.generate import generate
        >>> from shl.models.tiny import tiny_gemma
        >>> model = tiny_gemma()
        >>> [text] = generate(model, ["Hello?"], max_new_tokens=3, min_new_tokens=3)
        >>> bool(token_divergence(model, text).abs().max() < 1e-6)
        True
    """
    reference = reference or completion
    require(
        reference.tokens == completion.tokens,
        f"the {len(reference.tokens)} tokens of the reference must be the completion's "
        f"{len(completion.tokens)}.",
    )
    student = completion_hidden(model, [completion])
    with suspended(model):
        base = completion_hidden(model, [reference])
    return kl_values(model, student, base).cpu()
