"""A key-value cache for TransformerLens whose storage grows in place.

TransformerLens's attention stores keys before rotation, the fast attention after it.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shl.utils.model import Model
from shl.utils.shapes import Int


class LayerCache:
    """One layer's keys and values, stored as `[batch, kv_head, capacity, d_head]` each.

    Implements TransformerLens's interface of a cache entry, `[batch, pos, kv_head, d_head]`.
    """

    def __init__(self, batch: int, heads: int, d_head: int, like: Tensor, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.keys = like.new_empty(batch, heads, 0, d_head)
        self.values = like.new_empty(batch, heads, 0, d_head)

    @property
    def past_keys(self) -> Tensor:
        """`[batch, pos, kv_head, d_head]`; TransformerLens reads the past length off its shape."""
        return self.keys[:, :, : self.length].transpose(1, 2)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of new positions and return views of all positions."""
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        end = self.length + k.shape[2]
        if end > self.keys.shape[2]:
            self.capacity = max(self.capacity, end)
            self.keys = self._grown(self.keys, k)
            self.values = self._grown(self.values, v)
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        self.length = end
        return self.keys[:, :, :end].transpose(1, 2), self.values[:, :, :end].transpose(1, 2)

    def _grown(self, old: Tensor, new: Tensor) -> Tensor:
        grown = new.new_empty(*new.shape[:2], self.capacity, new.shape[3])
        if self.length:
            grown[:, :, : self.length] = old[:, :, : self.length]
        return grown

    def rows(self, index: Tensor, capacity: int) -> "LayerCache":
        """A copy with the rows `index` that can hold `capacity` positions."""
        copy = LayerCache(0, 0, 0, self.keys, max(capacity, self.length))
        copy.length = self.length
        copy.keys = copy._grown(self.keys[index, :, : self.length], self.keys[index, :, :0])
        copy.values = copy._grown(self.values[index, :, : self.length], self.values[index, :, :0])
        return copy

    def drop(self, moves: Sequence[tuple[int, int]], left: int) -> None:
        """Copy rows, (from, to) each, and keep the first `left` rows."""
        for source, target in moves:
            for stored in (self.keys, self.values):
                stored[target, :, : self.length] = stored[source, :, : self.length]
        self.keys, self.values = self.keys[:left], self.values[:left]


@dataclass
class KVCache:
    """A key-value cache for `model(tokens, attention_mask=…, past_kv_cache=…)`.

    The attention mask has the shape of the new tokens. `capacity` is the number of positions to
    allocate initially.

    Example:
        >>> import torch
        >>> from shl.models.tiny import tiny_gemma
        >>> model = tiny_gemma()
        >>> cache = KVCache.empty(model, batch=1, capacity=8)
        >>> for token in (5, 6):
        ...     logits = model(torch.tensor([[token]]), past_kv_cache=cache)
        >>> cache.length
        2
    """

    entries: list[LayerCache]
    mask: Tensor
    frozen: bool = False

    @classmethod
    def empty(cls, model: Model, batch: int, capacity: int = 0) -> "KVCache":
        """An empty cache."""
        cfg = model.cfg
        heads = cfg.n_key_value_heads or cfg.n_heads
        entries = [
            LayerCache(batch, heads, cfg.d_head, model.W_U, capacity) for _ in range(cfg.n_layers)
        ]
        return cls(entries, torch.ones(batch, 0, dtype=torch.long, device=model.W_U.device))

    @property
    def length(self) -> int:
        """Cached positions, padding included."""
        return self.mask.shape[1]

    def __getitem__(self, layer: int) -> LayerCache:
        return self.entries[layer]

    def append_attention_mask(self, attention_mask: Tensor) -> Tensor:
        """Append the mask of new tokens; TransformerLens calls it at the start of each forward."""
        self.mask = torch.cat([self.mask, attention_mask.to(self.mask)], 1)
        return self.mask

    def rows(self, index: Tensor, capacity: int = 0) -> "KVCache":
        """A copy with the rows `index`, in any order and with repeats."""
        entries = [entry.rows(index, capacity or entry.capacity) for entry in self.entries]
        return KVCache(entries, self.mask[index])

    def drop(self, gone: Collection[int]) -> list[int]:
        """Remove the rows `gone` in place. The last rows are moved into their places, so no more
        rows are copied than are removed.

        Returns:
            For each remaining row its former index.

        Example:
            >>> from shl.models.tiny import tiny_gemma
            >>> KVCache.empty(tiny_gemma(), batch=4).drop([1, 2])
            [0, 3]
        """
        before = len(self.mask)
        left = before - len(set(gone))
        free = [row for row in range(left) if row in gone]
        moves = list(zip((r for r in range(left, before) if r not in gone), free, strict=True))
        order = list(range(left))
        for source, target in moves:
            order[target] = source
        for entry in self.entries:
            entry.drop(moves, left)
        self.mask = self.mask[order]
        return order

    def put(self, rows: Sequence[int], other: "KVCache") -> None:
        """Replace `rows` by those of a cache that is not longer, with more padding on the left."""
        start, index = self.length - other.length, list(rows)
        for entry, new in zip(self.entries, other.entries, strict=True):
            entry.keys[index, :, start : self.length] = new.keys[:, :, : new.length]
            entry.values[index, :, start : self.length] = new.values[:, :, : new.length]
        mask = self.mask.clone()
        mask[index, :start], mask[index, start:] = 0, other.mask
        self.mask = mask

    def shorten(self, row: int, count: int) -> None:
        """Keep the first `count` positions of a row that are not padding, at the end of it."""
        at, start = self.mask[row].nonzero()[:count, 0], self.length - count
        for entry in self.entries:
            for stored in (entry.keys, entry.values):
                stored[row, :, start : self.length] = stored[row][:, at]
        mask = self.mask.clone()
        mask[row, :start], mask[row, start:] = 0, 1
        self.mask = mask

    def cut(self, length: int) -> None:
        """Remove the positions from `length` on."""
        for entry in self.entries:
            entry.length = min(entry.length, length)
        self.mask = self.mask[:, :length]


@dataclass
class PerForward:
    """Masks and rotary tables of the latest forward, shared by all layers.

    `explicit_positions` sets `at` `[batch, pos]` and `visible` `[batch, key]`.
    """

    at: Tensor | None = None
    visible: Tensor | None = None
    key: tuple[Any, ...] = ()
    held: Tensor | None = None
    content: Tensor | None = None
    made: dict[tuple[str, str], Any] = field(default_factory=dict)

    def start(self, attention_mask: Tensor | None, offset: int, new: int, like: Tensor) -> None:
        """Drop all tables unless mask, positions, device and dtype are those of the last call."""
        mask = attention_mask
        # Inference tensors have no version counter, so their content is compared.
        content = mask.clone() if mask is not None and mask.is_inference() else None
        version = None if mask is None or content is not None else mask._version
        # Inference tensors cannot be saved for a later backward.
        inference = torch.is_inference_mode_enabled()
        key = (id(mask), version, offset, new, inference, like.device, like.dtype)
        same = self.content is None or content is None or torch.equal(content, self.content)
        if key != self.key or not same:
            # A reference to the mask, so that no other tensor can get its id.
            self.key, self.held, self.content, self.made = key, mask, content, {}


@contextmanager
def explicit_positions(
    model: Model,
    at: Int[Tensor, "batch pos"],
    visible: Int[Tensor, "batch key"] | None = None,
) -> Iterator[None]:
    """Set the positions of the new tokens of one cached forward, and which keys are visible, if
    they do not follow from the attention mask. Needs a fast model."""
    per_forward: Any = model.blocks[0].attn.per_forward
    per_forward.at, per_forward.visible, per_forward.key = at, visible, ()
    try:
        yield
    finally:
        per_forward.at, per_forward.visible, per_forward.key = None, None, ()
        per_forward.held, per_forward.made = None, {}
