"""What all layers of one forward have in common: its rotary tables and masks, made once."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from shl.shapes import Int


@dataclass
class Shared:
    """What all layers of one forward have in common, remembered for the last forward.

    `at` `[batch, pos]` and `seen` `[batch, key]` are what `placed` says of the forward.
    """

    at: Tensor | None = None
    seen: Tensor | None = None
    key: tuple[Any, ...] = ()
    held: Tensor | None = None
    content: Tensor | None = None
    made: dict[tuple[str, str], Any] = field(default_factory=dict)

    def start(self, attention_mask: Tensor | None, offset: int, new: int, like: Tensor) -> None:
        """Forget everything unless this is the same forward as before, on the same device."""
        mask = attention_mask
        # Of inference tensors torch does not count the edits, so their content is compared.
        content = mask.clone() if mask is not None and mask.is_inference() else None
        version = None if mask is None or content is not None else mask._version
        # Inference tensors cannot be saved for a later backward.
        inference = torch.is_inference_mode_enabled()
        key = (id(mask), version, offset, new, inference, like.device, like.dtype)
        edited = (
            content is not None
            and self.content is not None
            and not torch.equal(content, self.content)
        )
        if key != self.key or edited:
            # Holding the mask keeps its id from being given to another tensor.
            self.key, self.held, self.content, self.made = key, mask, content, {}


@contextmanager
def placed(
    model: HookedTransformer,
    at: Int[Tensor, "batch pos"],
    seen: Int[Tensor, "batch key"] | None = None,
) -> Iterator[None]:
    """Say for one cached forward where its new tokens stand, and which keys may be looked at,
    where that does not follow from the attention mask."""
    first: Any = model.blocks[0].attn
    shared: Shared = first.shared
    shared.at, shared.seen, shared.key = at, seen, ()
    try:
        yield
    finally:
        shared.at, shared.seen, shared.key = None, None, ()
        shared.held, shared.made = None, {}
