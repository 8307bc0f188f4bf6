"""`as_hf`: a HookedTransformer, with whatever hooks are on, as a transformers causal LM.

Only the forward and the cache are ours; `generate` with all of its arguments is transformers' own.
Positions come from `position_ids` where given, else each row counts its own tokens by the mask, so
a result depends neither on padding nor on the batch. (transformers' own forward counts columns
where it is given no positions, so a left-padded cache that is continued without them is misread.)
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.utilities.activation_functions import apply_softcap
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from shl.fast import KVCache, explicit_positions, is_fast
from shl.hooks.handle import Handle, running
from shl.models.generate import run
from shl.models.tokens import end_ids
from shl.utils.errors import ShlError, require
from shl.utils.shapes import Int

GROWTH = 64
"""Positions to make room for beyond those asked for, where nobody says how many will come."""


class HookedCache(Cache):
    """The keys and values of all layers, and the position of every token that was cached.

    Unlike transformers' own caches it remembers which of its tokens are padding, so that what
    follows counts on from the right position and does not look at them, mask given or not.

    Example:
        >>> from shl.models.tiny import tiny_gemma
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
        self.held: KVCache | None = None
        self.positions: Int[Tensor, "batch key"] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "HookedCache":
        """A copy of the tokens, for the same model."""
        other = HookedCache(self.model, self.room)
        for name in ("prompts", "held", "positions"):
            setattr(other, name, copy.deepcopy(getattr(self, name), memo))
        return other

    def begin(self, batch: int, new: int) -> KVCache:
        """The keys and values, made at the first tokens; `new` are about to come."""
        if self.held is None or self.positions is None:
            room = max(self.room, new + GROWTH)
            self.held = KVCache.empty(self.model, batch, room)
            self.positions = self.held.mask.clone()
        seen = self.held.mask.shape[0]
        require(batch == seen, f"the cache holds {seen} rows, input_ids has {batch}.")
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
        require(
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


def as_hf(model: HookedTransformer) -> "HookedForCausalLM":
    """A transformers model over `model`, hooks included: those that are on when it runs.

    No weight is copied: `.parameters()` are the HookedTransformer's own. Where prompts are
    completed by `.generate`, hooks are told how long they are, as `shl.generate` does.

    Args:
        model: from `shl.load_model`.

    Returns:
        A `PreTrainedModel` with `GenerationMixin`. What it cannot do (`inputs_embeds`,
        `output_attentions`, masks of four dimensions, caches of another kind) ends with one
        sentence.

    Example:
        >>> import torch
        >>> from shl.models.tiny import tiny_gemma
        >>> model = tiny_gemma()
        >>> out = as_hf(model).generate(torch.tensor([[5, 6]]), max_new_tokens=3, min_new_tokens=3)
        >>> out.shape
        torch.Size([1, 5])

    Source: the protocol is transformers' own (https://huggingface.co/docs/transformers).
    """
    return HookedForCausalLM(model)


class _Config(PreTrainedConfig):
    """The sizes of a HookedTransformer under transformers' names.

    Private, because transformers gives it an `__init__` that the API reference cannot read.
    """

    model_type = "hooked_transformer"


class HookedForCausalLM(PreTrainedModel, GenerationMixin):
    """What `as_hf` returns."""

    config_class = _Config
    main_input_name = "input_ids"
    base_model_prefix = "hooked"
    _supports_sdpa = True

    def __init__(self, model: HookedTransformer) -> None:
        cfg = model.cfg
        ids: dict[str, Any] = {}
        if model.tokenizer is not None:
            ends = sorted(end_ids(model))
            ids = {
                "bos_token_id": model.tokenizer.bos_token_id,
                "eos_token_id": ends[0] if len(ends) == 1 else ends,
                "pad_token_id": model.tokenizer.pad_token_id,
            }
        sizes = {
            "name_or_path": cfg.model_name,
            "vocab_size": cfg.d_vocab,
            "hidden_size": cfg.d_model,
            "intermediate_size": cfg.d_mlp,
            "num_hidden_layers": cfg.n_layers,
            "num_attention_heads": cfg.n_heads,
            "num_key_value_heads": cfg.n_key_value_heads or cfg.n_heads,
            "head_dim": cfg.d_head,
            "max_position_embeddings": cfg.n_ctx,
            "tie_word_embeddings": False,
            "dtype": cfg.dtype,
        }
        config = _Config()
        for key, value in {**sizes, **ids}.items():
            setattr(config, key, value)
        super().__init__(config)
        self.generation_config = GenerationConfig(**ids)
        self.hooked = model
        self.training = model.training

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of new tokens `[batch, pos]`, after those in `past_key_values`.

        `attention_mask` is None (all real) or `[batch, past + pos]`; columns beyond are dropped,
        as transformers does, and must be 1. Padding that the cache remembers stays padding where
        there is no mask. As in transformers, a cache that is given grows whatever `use_cache` is.

        Raises:
            ShlError: an argument that cannot be honoured.
        """
        require(inputs_embeds is None, "inputs_embeds cannot be honoured, give input_ids.")
        require(not output_attentions, "output_attentions cannot be honoured, hook hook_pattern.")
        if input_ids is None or input_ids.ndim != 2 or not input_ids.shape[1]:
            seen = None if input_ids is None else tuple(input_ids.shape)
            raise ShlError(f"input_ids has shape {seen}, it must be (batch, pos) with a token.")
        cache = HookedCache(self.hooked) if past_key_values is None else past_key_values
        if not isinstance(cache, HookedCache):
            raise ShlError(
                f"past_key_values is a {type(cache).__name__}, it must be what this model "
                "returned, or None."
            )
        require(cache.model is self.hooked, "past_key_values belongs to another model.")
        # With a cache of its own even where none is kept, attention goes one way only.
        input_ids = input_ids.to(self.device)
        held = cache.begin(*input_ids.shape)
        new, visible = _masks(attention_mask, held.mask, input_ids)
        at = self._positions(position_ids, new, cache)
        hidden: list[Tensor] = []
        prompts = None if cache.prompts is None else cache.prompts.tolist()
        with (
            self._at_positions(at, new, visible, held),
            running(prompts=prompts),
            _watching(self.hooked, hidden) if output_hidden_states else nullcontext(),
        ):
            residual = run(self.hooked, input_ids, new, held)
        cache.add(at)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        everywhere = isinstance(logits_to_keep, int) and logits_to_keep == 0
        final = self.hooked.ln_final(residual if everywhere else residual[:, kept])
        cap = self.hooked.cfg.output_logits_soft_cap
        logits = apply_softcap(self.hooked.unembed(final), cap)
        if output_hidden_states:
            # transformers' last hidden state has passed the final norm.
            hidden[-1] = final if everywhere else self.hooked.ln_final(residual)
        loss = None
        if labels is not None:
            require(
                everywhere, "labels need the logits of all positions, logits_to_keep must be 0."
            )
            loss = ForCausalLMLoss(logits, labels, self.config.vocab_size)
        stays = use_cache is not False or past_key_values is not None
        out = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cache if stays else None,
            hidden_states=tuple(hidden) if output_hidden_states else None,
        )
        return out.to_tuple() if return_dict is False else out

    def _at_positions(
        self, at: Tensor, new: Tensor, visible: Tensor | None, held: KVCache
    ) -> AbstractContextManager[None]:
        """Run the new tokens at these positions, with these keys visible."""
        if is_fast(self.hooked):
            return explicit_positions(self.hooked, at.clamp(min=0), visible)
        # Stock attention counts positions from the mask.
        counted = torch.cat([held.mask, new], 1).cumsum(1)[:, -new.shape[1] :] - 1
        require(
            visible is None and torch.equal(at, counted.masked_fill(new == 0, -1)),
            "position_ids or attention_mask differ from what the mask of the cached and new tokens "
            "gives, which takes a model of load_model(..., fast=True).",
        )
        return nullcontext()

    def _positions(self, said: Tensor | None, new: Tensor, cache: HookedCache) -> Tensor:
        """Where new tokens stand, `[batch, pos]`; -1 is padding."""
        if said is None:
            at = cache.next_positions()[:, None] + new.cumsum(1) - 1
        else:
            require(
                said.ndim == 2 and said.shape[0] in (1, len(new)) and said.shape[1] == new.shape[1],
                f"position_ids has shape {tuple(said.shape)}, it must be that of input_ids, "
                f"{tuple(new.shape)}.",
            )
            at = said.to(new).expand(new.shape)
        at = at.masked_fill(new == 0, -1)
        low, high = int(at.masked_fill(new == 0, 0).min()), int(at.max())
        n_ctx = self.hooked.cfg.n_ctx
        require(
            low >= 0 and high < n_ctx,
            f"a token stands at position {low if low < 0 else high}, the context holds 0 to "
            f"{n_ctx - 1}.",
        )
        return at

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> bool:
        """What `generate` starts from: our cache, with room, which knows how long prompts are."""
        kind = generation_config.cache_implementation
        require(
            kind in (None, "dynamic"),
            f"cache_implementation is {kind!r}, this model has one kind, leave it None.",
        )
        if model_kwargs.get("past_key_values") is not None:
            model_kwargs["past_key_values"]._is_user_defined = True
        elif generation_config.use_cache is not False:
            cache = HookedCache(self.hooked, max_cache_length)
            mask = model_kwargs.get("attention_mask")
            cache.prompts = None if mask is None else mask.sum(1)
            model_kwargs["past_key_values"] = cache
        return True

    @property
    def device(self) -> torch.device:
        """Where the HookedTransformer lives."""
        return self.hooked.W_U.device

    @property
    def dtype(self) -> torch.dtype:
        """The HookedTransformer's."""
        return self.hooked.W_U.dtype

    def get_input_embeddings(self) -> NoReturn:
        """Refused: TransformerLens keeps `W_E` as a plain matrix."""
        raise ShlError("the embedding of a HookedTransformer is model.W_E, no module.")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HookedForCausalLM":
        """`.to(...)` of what is there already; anything else is the HookedTransformer's affair."""
        unembed = self.hooked.W_U
        moved = fn(unembed.new_empty(0))
        require(
            (moved.device, moved.dtype) == (unembed.device, unembed.dtype),
            f"the view lives where its model does ({unembed.device}, {unembed.dtype}), load the "
            f"model with the device and dtype that you want.",
        )
        return self

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: hooks cannot be saved as weights."""
        raise ShlError("a view cannot be saved, write a folder with shl.export_hf.")


def _masks(given: Tensor | None, past: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """The mask of the new tokens, and of all keys if it is not just the cache's and that."""
    if given is None:
        return torch.ones_like(ids), None
    total = past.shape[1] + ids.shape[1]
    require(
        given.ndim == 2 and len(given) == len(ids) and given.shape[1] >= total,
        f"attention_mask has shape {tuple(given.shape)}, it must be (batch, past + new), "
        f"{(len(ids), total)}.",
    )
    given = given.to(past)
    require(bool(((given == 0) | (given == 1)).all()), "attention_mask holds other than 0 and 1.")
    require(
        bool(given[:, total:].all()),
        f"attention_mask has {given.shape[1]} columns and hides some beyond the {total} tokens.",
    )
    given = given[:, :total]
    same = torch.equal(given[:, : past.shape[1]], past)
    return given[:, past.shape[1] :], None if same else given


def _watching(model: HookedTransformer, hidden: list[Tensor]) -> Handle:
    """Collect the residual stream before the first block and after each."""
    handle = Handle(model)

    def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0] if args else kwargs["resid_pre"])

    handle.add_pre_hook(model.blocks[0], before)
    for block in model.blocks:
        handle.add_hook(block, hidden.append)
    return handle
