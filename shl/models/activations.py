"""Activations at any HookPoint, at the assistant tag or another position of each prompt."""

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from shl.hooks.handle import Handle, running, suspended
from shl.hooks.recorder import Recorder
from shl.hooks.sites import check_layers, residual_after
from shl.models.nan_checks import require_finite
from shl.models.tokens import Prompt, encode, length_batches, pad_left
from shl.utils.errors import in_batches, require
from shl.utils.shapes import Float


@torch.no_grad()
def activations(
    model: HookedTransformer,
    prompts: Sequence[str | Prompt],
    sites: Sequence[str],
    *,
    tokens: int | Sequence[int] = -1,
    batch_size: int = 16,
) -> dict[str, Float[Tensor, "n ..."]]:
    """What passes the named HookPoints at chosen tokens of each prompt, on the model as it stands.

    (`shl.hooks.recorder.Recorder` keeps every position, and each step of cached generation.)

    Args:
        sites: TransformerLens's names, of HookPoints with batch and position first
            (`blocks.3.hook_resid_post`, `blocks.0.attn.hook_z`).
        tokens: absolute positions in the prompt's own tokens, padding not counted; -1 is the
            assistant tag, 0 the first.

    Returns:
        Per site `[n, ...]`, one row per prompt, or `[n, len(tokens), ...]` for several tokens; in
        the model's dtype, on the CPU.

    Raises:
        ShlError: an unknown name, a token outside a prompt, or a HookPoint whose second axis is
            not the position.

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> name = "blocks.0.attn.hook_z"
        >>> activations(tiny_gemma(), ["Hello?", "And you?"], [name])[name].shape
        torch.Size([2, 4, 16])
    """
    rows = [encode(model, prompt) for prompt in prompts]
    asked = [tokens] if isinstance(tokens, int) else list(tokens)
    require(len(asked) > 0, "tokens is empty, name at least one.")
    for row in rows:
        for token in asked:
            require(
                -len(row) <= token < len(row),
                f"token {token} is asked for, a prompt has {len(row)} tokens.",
            )
    out: dict[str, Tensor] = {}

    def work(indices: list[int]) -> None:
        batch = pad_left(model, [rows[i] for i in indices])
        width = batch.tokens.shape[1]
        with running(rows=indices), Recorder(model, sites) as recorder:
            model(batch.tokens, attention_mask=batch.mask, stop_at_layer=model.cfg.n_layers)
        at = torch.tensor(
            [[t % len(rows[i]) + width - len(rows[i]) for t in asked] for i in indices]
        )
        for name, seen in recorder.seen.items():
            require(
                bool(seen) and seen[0].shape[1:2] == (width,),
                f"{name!r} has no axis of positions where one is needed, or is not reached before "
                "the unembedding.",
            )
            picked = seen[0].cpu()[torch.arange(len(indices))[:, None], at]
            picked = picked[:, 0] if isinstance(tokens, int) else picked
            out.setdefault(name, picked.new_empty(len(rows), *picked.shape[1:]))[indices] = picked

    in_batches(length_batches([len(row) for row in rows], batch_size), work, "recording")
    return out


def difference(
    model: HookedTransformer,
    prompts: Sequence[str | Prompt],
    layers: Sequence[int],
    *,
    batch_size: int = 16,
) -> dict[int, Float[Tensor, "n d_model"]]:
    """The residual at the assistant tag on the model as it stands, minus that of base (this
    package's hooks suspended), per layer, on the same tokens.

    Its mean over prompts is the shift that the student has made its own.

    Args:
        layers: the residual stream after each of these.

    Returns:
        Per layer `[n, d_model]`, one row per prompt, fp32.

    Raises:
        ShlError: no layer, or one that the model does not have.

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> float(difference(tiny_gemma(), ["Hello?"], [1])[1].abs().max())
        0.0
    """
    now = residual_at_tag(model, prompts, layers, batch_size=batch_size)
    with suspended(model):
        base = residual_at_tag(model, prompts, layers, batch_size=batch_size)
    return {layer: now[layer] - base[layer] for layer in now}


class Capture(Handle):
    """Keeps the residual stream after `layers` at the last position of each batch."""

    def __init__(self, model: HookedTransformer, layers: Iterable[int]) -> None:
        super().__init__(model)
        self.last: dict[int, Float[Tensor, "batch d_model"]] = {}
        for layer in layers:
            self.add_hook(residual_after(model, layer), partial(self._keep, layer))

    def _keep(self, layer: int, h: Tensor) -> None:
        self.last[layer] = h[:, -1].detach().clone()


def residual_at_tag(
    model: HookedTransformer,
    prompts: Sequence[str | Prompt],
    layers: Sequence[int],
    *,
    batch_size: int = 16,
) -> dict[int, Float[Tensor, "n d_model"]]:
    """The residual stream after each layer at the assistant tag, one row per prompt, in fp32.

    Runs only as far as the last layer asked for.

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> residual_at_tag(tiny_gemma(), ["Hello?", "A longer one?"], [0])[0].shape
        torch.Size([2, 32])
    """
    check_layers(model, layers)
    require(len(layers) > 0, "layers is empty, name at least one.")
    rows = [encode(model, prompt) for prompt in prompts]
    out = {layer: torch.empty(len(rows), model.cfg.d_model) for layer in layers}

    def work(indices: list[int]) -> None:
        batch = pad_left(model, [rows[i] for i in indices])
        with running(rows=indices), Capture(model, layers) as capture, torch.no_grad():
            model(batch.tokens, attention_mask=batch.mask, stop_at_layer=max(layers) + 1)
        for layer in layers:
            require_finite(
                capture.last[layer],
                f"a residual after layer {layer}",
                model,
                lambda: [rows[i] for i in indices],
                indices,
            )
            out[layer][indices] = capture.last[layer].float().cpu()

    in_batches(length_batches([len(row) for row in rows], batch_size), work, "extraction")
    return out
