"""Activations at any HookPoint, at the assistant tag or other positions of each prompt."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from shl.hooks.handle import Handle, running, suspended
from shl.hooks.recorder import Recorder
from shl.hooks.sites import check_layers, residual_after
from shl.models.generate import prefill
from shl.models.nan_checks import require_finite
from shl.models.tokens import Prompt, encode, length_batches, pad_left
from shl.utils.errors import in_batches, require
from shl.utils.model import Model
from shl.utils.shapes import Float


@torch.no_grad()
def activations(
    model: Model,
    prompts: Sequence[str | Prompt],
    sites: Sequence[str],
    *,
    tokens: int | Sequence[int] = -1,
    batch_size: int = 16,
) -> dict[str, Float[Tensor, "n ..."]]:
    """Activations at the named HookPoints and given tokens of each prompt, with all hooks active.

    (`shl.hooks.recorder.Recorder` stores all positions, and each step of cached generation.)

    Args:
        sites: TransformerLens's names of HookPoints whose first axes are batch and position
            (`blocks.3.hook_resid_post`, `blocks.0.attn.hook_z`).
        tokens: absolute positions in the prompt, without padding; -1 is the assistant tag, 0 the
            first token.

    Returns:
        Per site `[n, ...]`, one row per prompt, or `[n, len(tokens), ...]` for several tokens; in
        the model's dtype, on the CPU.

    Raises:
        ShlError: a name is unknown, a token is outside a prompt, or a HookPoint's second axis is
            not the position.

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> name = "blocks.0.attn.hook_z"
        >>> activations(tiny_gemma(), ["Hello?", "And you?"], [name])[name].shape
        torch.Size([2, 4, 16])
    """
    rows = [encode(model, prompt) for prompt in prompts]
    selected = [tokens] if isinstance(tokens, int) else list(tokens)
    require(len(selected) > 0, "tokens is empty, it must have at least one position.")
    shortest = min(map(len, rows), default=0)
    for token in selected:
        require(
            not rows or -shortest <= token < shortest,
            f"token {token} is out of range for a prompt of {shortest} tokens.",
        )
    out: dict[str, Tensor] = {}

    def work(indices: list[int]) -> None:
        ids, mask = pad_left(model, [rows[i] for i in indices])
        width = ids.shape[1]
        with running(rows=indices), Recorder(model, sites) as recorder:
            model(ids, attention_mask=mask, stop_at_layer=model.cfg.n_layers)
        lengths = torch.tensor([[len(rows[i])] for i in indices])
        at = torch.tensor([selected]) % lengths + width - lengths
        for name, recorded in recorder.seen.items():
            require(
                bool(recorded) and recorded[0].shape[1:2] == (width,),
                f"the second axis of {name!r} is not the position, or it is not reached before the "
                "unembedding.",
            )
            picked = recorded[0].cpu()[torch.arange(len(indices))[:, None], at]
            picked = picked[:, 0] if isinstance(tokens, int) else picked
            out.setdefault(name, picked.new_empty(len(rows), *picked.shape[1:]))[indices] = picked

    in_batches(length_batches([len(row) for row in rows], batch_size), work, "recording")
    return out


def difference(
    model: Model,
    prompts: Sequence[str | Prompt],
    layers: Sequence[int],
    *,
    batch_size: int = 16,
) -> dict[int, Float[Tensor, "n d_model"]]:
    """The residual at the assistant tag of the hooked model minus that of base (handles suspended),
    on the same tokens.

    Its mean over prompts is the shift that training has added.

    Args:
        layers: layers after which the residual stream is taken.

    Returns:
        Per layer `[n, d_model]`, one row per prompt, fp32.

    Raises:
        ShlError: there is no layer, or the model does not have it.

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> float(difference(tiny_gemma(), ["Hello?"], [1])[1].abs().max())
        0.0
    """
    now = residual_at_tag(model, prompts, layers, batch_size=batch_size)
    with suspended(model):
        base = residual_at_tag(model, prompts, layers, batch_size=batch_size)
    return {layer: now[layer] - base[layer] for layer in now}


@torch.no_grad()
def residual_at_tag(
    model: Model,
    prompts: Sequence[str | Prompt],
    layers: Sequence[int],
    *,
    batch_size: int = 16,
) -> dict[int, Float[Tensor, "n d_model"]]:
    """The residual stream after each layer at the assistant tag, one row per prompt, in fp32.

    Prompts are run as `shl.models.generate.prefill` does, a shared persona once per batch.

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> residual_at_tag(tiny_gemma(), ["Hello?", "A longer one?"], [0])[0].shape
        torch.Size([2, 32])
    """
    check_layers(model, layers)
    require(len(layers) > 0, "layers is empty, name at least one.")
    rows = [encode(model, prompt) for prompt in prompts]
    out = {layer: torch.empty(len(rows), model.cfg.d_model) for layer in layers}
    last: dict[int, Tensor] = {}

    def store(layer: int, h: Tensor) -> None:
        last[layer] = h[:, -1].clone()

    def work(indices: list[int]) -> None:
        chosen = [rows[i] for i in indices]
        with running(rows=indices), Handle(model) as handle:
            for layer in layers:
                handle.add_hook(residual_after(model, layer), partial(store, layer))
            prefill(model, chosen, layers=max(layers) + 1)
        for layer in layers:
            what = f"a residual after layer {layer}"
            require_finite(last[layer], what, model, lambda: chosen, indices)
            out[layer][indices] = last[layer].float().cpu()

    in_batches(length_batches([len(row) for row in rows], batch_size), work, "extraction")
    return out
