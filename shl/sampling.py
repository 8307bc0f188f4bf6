"""From the last residual to the next token: the top logits, and a draw among them."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.utilities.activation_functions import apply_softcap

from shl.config import GenerateConfig
from shl.errors import check
from shl.shortlist import applies, top_logits


def next_logits(
    model: HookedTransformer, residual: Float[Tensor, "batch 1 d_model"], *, k: int = 0
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """The `k` largest logits, descending, fp32, and their tokens, from the residual stream after
    the last layer at one position per row.

    `k` 0 is the whole vocabulary, in its own order.

    Example:
        >>> import torch
        >>> from shl.tiny import tiny_gemma
        >>> next_logits(tiny_gemma(), torch.ones(1, 1, 32), k=4)[1].shape
        torch.Size([1, 4])
    """
    hidden = model.ln_final(residual)
    cap = model.cfg.output_logits_soft_cap
    if k and applies(model):
        bias = model.b_U if bool(model.b_U.any()) else None
        values, ids = top_logits(hidden[:, 0], model.W_U, min(k, model.cfg.d_vocab), bias=bias)
        return apply_softcap(values, cap), ids
    logits = apply_softcap(model.unembed(hidden)[:, 0], cap).float()
    if k:
        top = logits.topk(min(k, logits.shape[1]))
        return top.values, top.indices
    return logits, torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1)


def sample(
    logits: Float[Tensor, "batch n"],
    draws: Float[Tensor, " batch"],
    config: GenerateConfig,
    tokens: Int[Tensor, "batch n"] | None = None,
) -> Int[Tensor, " batch"]:
    """One token per row, by inverting the distribution's cumulative sum at `draws` in [0, 1).

    `logits` belong to `tokens`, or to the vocabulary in its order.

    Raises:
        ShlError: a row whose largest logit is not finite.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
        >>> config = GenerateConfig(top_k=0, top_p=1.0)
        >>> [int(sample(logits, torch.tensor([u]), config)) for u in (0.49, 0.51, 0.81)]
        [0, 1, 2]
    """
    greedy = config.temperature == 0
    wanted = 1 if greedy else config.top_k or logits.shape[1]
    top = logits.topk(min(wanted, logits.shape[1]))
    check(bool(torch.isfinite(top.values[:, 0]).all()), "the logits are not finite.")
    ids = top.indices if tokens is None else tokens.gather(1, top.indices)
    if greedy:
        return ids[:, 0]
    p = (top.values / config.temperature).double().softmax(-1)
    before = p.cumsum(-1) - p
    p = torch.where(before < config.top_p, p, 0.0)
    cumulative = p.cumsum(-1)
    threshold = draws[:, None].double() * cumulative[:, -1:]
    # The first token whose cumulative share exceeds the draw; zero-width ones are never first.
    rank = (cumulative > threshold).int().argmax(-1)
    return ids.gather(-1, rank[:, None])[:, 0]
