"""Our key-value cache, as transformers' `Cache` protocol speaks of one."""

import copy
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers import Cache

from shl.cache import KeyValues
from shl.errors import ShlError, check
from shl.shapes import Int

GROWTH = 64
"""Positions to make room for beyond those asked for, where nobody says how many will come."""


class HookedCache(Cache):
    """The keys and values of all layers, and the position of every token that was cached.

    Unlike transformers' own caches it remembers which of its tokens are padding, so that what
    follows counts on from the right position and does not look at them, mask given or not.

    Example:
        >>> from shl.tiny import tiny_gemma
        >>> cache = HookedCache(tiny_gemma())
        >>> cache.get_seq_length()
        0
    """

    def __init__(self, model: HookedTransformer, room: int = 0) -> None:
        super().__init__(layers=[])
        self.model = model
        self.room = room
        self.prompts: Tensor | None = None
        """`[batch]`: prompt tokens of each row, where `generate` began with it."""
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.held: KeyValues | None = None
        self.positions: Int[Tensor, "batch key"] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "HookedCache":
        """A copy of the tokens, for the same model."""
        other = HookedCache(self.model, self.room)
        for name in ("prompts", "held", "positions"):
            setattr(other, name, copy.deepcopy(getattr(self, name), memo))
        return other

    def begin(self, batch: int, new: int) -> KeyValues:
        """The keys and values, made at the first tokens; `new` are about to come."""
        if self.held is None or self.positions is None:
            room = max(self.room, new + GROWTH)
            self.held = KeyValues.empty(self.model, batch, room)
            self.positions = self.held.mask.clone()
        seen = self.held.mask.shape[0]
        check(batch == seen, f"the cache holds {seen} rows, input_ids has {batch}.")
        return self.held

    def next_positions(self) -> Int[Tensor, " batch"]:
        """Where each row's next token stands."""
        assert self.positions is not None
        if not self.positions.shape[1]:
            return self.positions.new_zeros(len(self.positions))
        return self.positions.amax(1) + 1

    def add(self, at: Int[Tensor, "batch pos"]) -> None:
        """Remember where new tokens stand; -1 is padding."""
        assert self.positions is not None
        self.positions = torch.cat([self.positions, at], 1)

    def _select(self, index: Tensor) -> None:
        if self.held is None or self.positions is None:
            return
        index = index.to(self.positions.device)
        self.held = self.held.rows(index)
        self.positions = self.positions[index]
        if self.prompts is not None:
            self.prompts = self.prompts[index]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take rows in another order, as beam search does."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.held is not None:
            rows = torch.arange(self.held.mask.shape[0])
            self._select(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._select(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` positions.

        Raises:
            ShlError: a number above 0, or more than there are.
        """
        length = self.get_seq_length()
        check(
            -length <= tokens_to_remove <= 0,
            f"crop({tokens_to_remove}) of {length} positions, it must be {-length} to 0.",
        )
        if self.held is not None and self.positions is not None and tokens_to_remove:
            self.held.cut(length + tokens_to_remove)
            self.positions = self.positions[:, :tokens_to_remove]

    def activate_past_recording(self) -> None:
        """Nothing to do: all positions are kept."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions held, padding included."""
        return 0 if self.held is None else self.held.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: it grows."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """How many keys there will be, and the first one's index."""
        return self.get_seq_length() + query_length, 0

    @property
    def is_compileable(self) -> bool:
        """False: it grows."""
        return False

    @property
    def is_croppable(self) -> bool:
        """True: every layer keeps all positions."""
        return True

    @property
    def is_initialized(self) -> bool:
        """Whether it holds tokens."""
        return self.held is not None

    @property
    def batch_size(self) -> int:
        """Rows held."""
        return 0 if self.held is None else self.held.mask.shape[0]

    def __len__(self) -> int:
        return self.model.cfg.n_layers

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the layers of a HookedTransformer fill it themselves."""
        raise ShlError("this cache is filled by a HookedTransformer, not layer by layer.")
