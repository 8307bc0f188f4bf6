"""Reading activations: the residual stream at the assistant tag."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from shl.errors import check
from shl.hooks import Handle
from shl.sites import check_layers, residual_after
from shl.tokens import Prompt, encode, length_batches, pad_left


class Capture(Handle):
    """Keeps the residual stream after `layers` at the last position of each batch."""

    def __init__(self, model: HookedTransformer, layers: Iterable[int]) -> None:
        super().__init__(model)
        self.last: dict[int, Float[Tensor, "batch d_model"]] = {}
        for layer in layers:
            self._add(residual_after(model, layer), lambda h, i=layer: self._keep(i, h))

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
        >>> from shl.tiny import tiny_gemma
        >>> residual_at_tag(tiny_gemma(), ["Hello?", "A longer one?"], [0])[0].shape
        torch.Size([2, 32])
    """
    check_layers(model, layers)
    check(len(layers) > 0, "layers is empty, name at least one.")
    rows = [encode(model, prompt) for prompt in prompts]
    out = {layer: torch.empty(len(rows), model.cfg.d_model) for layer in layers}
    for indices in length_batches([len(row) for row in rows], batch_size):
        batch = pad_left(model, [rows[i] for i in indices])
        with Capture(model, layers) as capture, torch.no_grad():
            model(batch.tokens, attention_mask=batch.mask, stop_at_layer=max(layers) + 1)
        for layer in layers:
            out[layer][indices] = capture.last[layer].float().cpu()
    return out
