"""`as_hf`: a HookedTransformer, hooks included, as a transformers causal language model.

The forward and the cache are implemented here; `generate` is transformers' own. Without
`position_ids` positions count each row's unmasked tokens, so results do not depend on padding.
(transformers' own models count columns, which is wrong after a left-padded cache.)
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformer_lens.utilities.activation_functions import apply_softcap
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from shl.fast import KVCache, explicit_positions, is_fast
from shl.hooks.handle import Handle, running
from shl.hooks.sites import wrapped_by
from shl.models.generate import run
from shl.models.tokens import end_ids
from shl.utils.errors import ShlError, require
from shl.utils.model import Model
from shl.utils.shapes import Int

GROWTH = 64
"""Positions to allocate in addition to the first ones, if the final length is unknown."""


class HookedCache(Cache):
    """The keys and values of all layers, and the position of every cached token.

    Unlike transformers' own caches it stores which tokens are padding, so that later tokens have
    the right positions and attention with or without a mask.

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> cache = HookedCache(tiny_gemma())
        >>> cache.get_seq_length()
        0
    """

    def __init__(self, model: Model, capacity: int = 0) -> None:
        super().__init__(layers=[])
        self.model = model
        self.capacity = capacity
        self.prompts: Tensor | None = None
        """`[batch]`: number of prompt tokens of each row, set by `generate`."""
        self.reset()

    def reset(self) -> None:
        """Remove all tokens."""
        self.held: KVCache | None = None
        self.positions: Int[Tensor, "batch key"] = torch.empty(0, 0, dtype=torch.long)

    def __deepcopy__(self, memo: dict[int, Any]) -> "HookedCache":
        """A copy of the cached tokens, for the same model."""
        other = HookedCache(self.model, self.capacity)
        for name in ("prompts", "held", "positions"):
            setattr(other, name, copy.deepcopy(getattr(self, name), memo))
        return other

    def begin(self, batch: int, new: int) -> KVCache:
        """The keys and values, allocated on the first call, for a forward of `new` tokens."""
        if self.held is None:
            capacity = max(self.capacity, new + GROWTH)
            self.held = KVCache.empty(self.model, batch, capacity)
            self.positions = self.held.mask.clone()
        rows = self.batch_size
        require(batch == rows, f"the cache holds {rows} rows, input_ids has {batch}.")
        return self.held

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select rows, in any order and with repeats."""
        if self.held is None:
            return
        indices = indices.to(self.positions.device)
        self.held = self.held.rows(indices)
        self.positions = self.positions[indices]
        if self.prompts is not None:
            self.prompts = self.prompts[indices]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` positions.

        Raises:
            ShlError: the number is above 0, or removes more positions than are cached.
        """
        length = self.get_seq_length()
        require(
            -length <= tokens_to_remove <= 0,
            f"crop({tokens_to_remove}) of {length} positions, it must be {-length} to 0.",
        )
        if self.held is not None and tokens_to_remove:
            self.held.cut(length + tokens_to_remove)
            self.positions = self.positions[:, :tokens_to_remove]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of cached positions, padding included."""
        return 0 if self.held is None else self.held.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: the cache has no maximum length."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """The number of keys after `query_length` new tokens, and the index of the first key."""
        return self.get_seq_length() + query_length, 0

    @property
    def is_initialized(self) -> bool:
        """Whether memory is allocated."""
        return self.held is not None

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return 0 if self.held is None else self.held.mask.shape[0]

    def __len__(self) -> int:
        return self.model.cfg.n_layers

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported: the layers of a HookedTransformer update the cache."""
        raise ShlError("this cache is filled by a HookedTransformer, not layer by layer.")


def as_hf(model: Model) -> PreTrainedModel:
    """A transformers view of a model of `shl.load_model`; hooks that are active when it runs apply.

    No weight is copied. A TransformerBridge already is a view: the result is the model of
    transformers that it wraps, for which `half_life` counts all tokens as prompt. For a
    HookedTransformer, `.generate` declares the prompt lengths to hooks, as `shl.generate` does.

    Returns:
        A `PreTrainedModel` with `GenerationMixin`. On a HookedTransformer, unsupported
        arguments (`inputs_embeds`, `output_attentions`, four-dimensional masks, other cache
        classes) raise ShlError.

    Example:
        >>> import torch
        >>> from shl.models.tiny import tiny_gemma
        >>> model = tiny_gemma()
        >>> out = as_hf(model).generate(torch.tensor([[5, 6]]), max_new_tokens=3, min_new_tokens=3)
        >>> out.shape
        torch.Size([1, 5])

    Source: the interface is that of https://huggingface.co/docs/transformers.
    """
    return wrapped_by(model) or HookedForCausalLM(model)


class _Config(PreTrainedConfig):
    # Private, because transformers generates an `__init__` that the API reference cannot parse.
    model_type = "hooked_transformer"


class HookedForCausalLM(PreTrainedModel, GenerationMixin):
    """A transformers view of a HookedTransformer, returned by `as_hf`."""

    config_class = _Config
    main_input_name = "input_ids"
    base_model_prefix = "hooked"
    _supports_sdpa = True

    def __init__(self, model: Model) -> None:
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

        `attention_mask` is None (no new padding; cached padding stays masked) or
        `[batch, past + pos]`; further columns must be 1 and are dropped, as in transformers. Also
        as in transformers, a given cache grows even if `use_cache` is False.

        Raises:
            ShlError: an argument is not supported.
        """
        require(inputs_embeds is None, "inputs_embeds is not supported, use input_ids.")
        require(not output_attentions, "output_attentions is not supported, hook hook_pattern.")
        if input_ids is None or input_ids.ndim != 2 or not input_ids.shape[1]:
            shape = None if input_ids is None else tuple(input_ids.shape)
            raise ShlError(f"input_ids has shape {shape}, it must be (batch, pos) with a token.")
        cache = HookedCache(self.hooked) if past_key_values is None else past_key_values
        if not isinstance(cache, HookedCache):
            raise ShlError(
                f"past_key_values is a {type(cache).__name__}, it must be what this model "
                "returned, or None."
            )
        require(cache.model is self.hooked, "past_key_values belongs to another model.")
        # Always run with a cache, so that there is a single code path for attention.
        input_ids = input_ids.to(self.device)
        held = cache.begin(*input_ids.shape)
        new, visible = _masks(attention_mask, held.mask, input_ids)
        at = self._positions(position_ids, new, cache)
        hidden: list[Tensor] = []
        with (
            self._at_positions(at, new, visible, held),
            running(prompts=None if cache.prompts is None else cache.prompts.tolist()),
            _collect_residuals(self.hooked, hidden) if output_hidden_states else nullcontext(),
        ):
            residual = run(self.hooked, input_ids, new, held)
        cache.positions = torch.cat([cache.positions, at], 1)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        everywhere = isinstance(logits_to_keep, int) and logits_to_keep == 0
        final = self.hooked.ln_final(residual[:, keep])
        logits = apply_softcap(self.hooked.unembed(final), self.hooked.cfg.output_logits_soft_cap)
        if output_hidden_states:
            # In transformers the last hidden state includes the final norm.
            hidden[-1] = final if everywhere else self.hooked.ln_final(residual)
        loss = None
        if labels is not None:
            require(everywhere, "labels need the logits of all positions; use logits_to_keep=0.")
            loss = ForCausalLMLoss(logits, labels, self.config.vocab_size)
        out = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=None if use_cache is False and past_key_values is None else cache,
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

    def _positions(self, given: Tensor | None, new: Tensor, cache: HookedCache) -> Tensor:
        """The positions of new tokens, `[batch, pos]`; -1 is padding."""
        if given is None:
            # The extra column is for an empty cache.
            last = torch.nn.functional.pad(cache.positions, (1, 0), value=-1).amax(1, keepdim=True)
            at = last + new.cumsum(1)
        else:
            batch, pos = new.shape
            require(
                given.ndim == 2 and given.shape[0] in (1, batch) and given.shape[1] == pos,
                f"position_ids has shape {tuple(given.shape)}, it must be that of input_ids, "
                f"{(batch, pos)}.",
            )
            at = given.to(new).expand(new.shape)
        at = at.masked_fill(new == 0, -1)
        low, high = int(at.masked_fill(new == 0, 0).min()), int(at.max())
        n_ctx = self.hooked.cfg.n_ctx
        require(
            low >= 0 and high < n_ctx,
            f"a token has position {low if low < 0 else high}, the context has 0 to {n_ctx - 1}.",
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
        """Start `generate` with a cache of the full capacity and the lengths of the prompts."""
        kind = generation_config.cache_implementation
        require(
            kind in (None, "dynamic"),
            f"cache_implementation is {kind!r}, it must be None or 'dynamic'.",
        )
        if model_kwargs.get("past_key_values") is not None:
            model_kwargs["past_key_values"]._is_user_defined = True
        elif generation_config.use_cache is not False:
            cache = HookedCache(self.hooked, max_cache_length)
            mask = model_kwargs.get("attention_mask")
            cache.prompts = None if mask is None else mask.sum(1)
            model_kwargs["past_key_values"] = cache
        return True

    def get_input_embeddings(self) -> NoReturn:
        """Not supported: TransformerLens stores `W_E` as a plain matrix."""
        raise ShlError("the embedding of a HookedTransformer is model.W_E, not a module.")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HookedForCausalLM":
        """Allow `.to(...)` with the model's own device and dtype only."""
        unembed = self.hooked.W_U
        moved = fn(unembed.new_empty(0))
        require(
            (moved.device, moved.dtype) == (unembed.device, unembed.dtype),
            f"the view has its model's device and dtype ({unembed.device}, {unembed.dtype}); to "
            "change them, load the model with the device and dtype that you need.",
        )
        return self

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported: hooks cannot be saved as weights."""
        raise ShlError("a view cannot be saved, write a folder with shl.export_hf.")


def _masks(given: Tensor | None, past: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """The mask of the new tokens, and that of all keys if it differs from the cache's mask."""
    if given is None:
        return torch.ones_like(ids), None
    total = past.shape[1] + ids.shape[1]
    require(
        given.ndim == 2 and len(given) == len(ids) and given.shape[1] >= total,
        f"attention_mask has shape {tuple(given.shape)}, it must be (batch, past + new), "
        f"{(len(ids), total)}.",
    )
    given = given.to(past)
    require(
        bool(((given == 0) | (given == 1)).all()),
        f"attention_mask has values from {given.min()} to {given.max()}, they must be 0 or 1.",
    )
    require(
        bool(given[:, total:].all()),
        f"attention_mask has zeros after column {total}, the number of tokens; they must be 1.",
    )
    given = given[:, :total]
    same = torch.equal(given[:, : past.shape[1]], past)
    return given[:, past.shape[1] :], None if same else given


def _collect_residuals(model: Model, hidden: list[Tensor]) -> Handle:
    """Append the residual stream before the first block and after each block to `hidden`."""
    handle = Handle(model)
    handle.add_pre_hook(
        model.blocks[0],
        lambda args, kwargs: hidden.append(args[0] if args else kwargs["resid_pre"]),
    )
    for block in model.blocks:
        handle.add_hook(block, hidden.append)
    return handle
