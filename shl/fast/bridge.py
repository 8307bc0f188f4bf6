"""A TransformerBridge that is called like a HookedTransformer and computes what transformers does.

TransformerBridge wraps transformers' module tree and computes attention and norms again, step by
step, so that scores, pattern and scale have HookPoints. Here transformers' own attention and norms
run wherever none of those HookPoints has a hook. Gemma-2's soft-capped scores exist in its eager
attention only, so such a model keeps that.

transformers 5.24 has renamed the argument `past_key_values` of its layers to `cache`, which the
step-by-step attention of TransformerLens 4.3 does not read: a cached step would not see the prompt.
"""

import inspect
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import LinearBridge, NormalizationBridge
from transformers import Cache

from shl.fast.hooked import is_hooked
from shl.fast.kv_cache import KVCache
from shl.utils.errors import require
from shl.utils.shapes import Int

SPLIT = ("use_split_qkv_input", "use_attn_in", "use_attn_result")
"""TransformerLens's settings that only its step-by-step attention implements."""


class NativeAttention(nn.Module):
    """Mixin for a bridge's attention: transformers' own forward, with `hook_in` and `hook_out`."""

    fast: ClassVar[bool] = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The arguments and results of transformers' attention."""
        if _step_by_step(self):
            if "cache" in kwargs:
                kwargs["past_key_values"] = kwargs.pop("cache")
            return super().forward(*args, **kwargs)
        own: Any = self
        x, *rest = args or (kwargs.pop("hidden_states"),)
        out, *others = own.original_component(own.hook_in(x), *rest, **kwargs)
        return own.hook_out(out), *others


def _step_by_step(attention: Any) -> bool:
    """Whether a HookPoint or a setting is used that transformers' attention does not have."""
    inner = (
        point
        for name, point in attention._modules.items()
        if isinstance(point, HookPoint) and name not in ("hook_in", "hook_out")
    )
    config = attention.config
    return any(map(is_hooked, inner)) or any(getattr(config, name, False) for name in SPLIT)


class NativeNorm(nn.Module):
    """Mixin for a bridge's norm: transformers' own, without what only `hook_scale` and
    `hook_normalized` need."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """`[..., d]` to `[..., d]`."""
        own: Any = self
        inner = (own.hook_scale, own.hook_normalized)
        if any(map(is_hooked, inner)) or not own.use_native_layernorm_autograd:
            return super().forward(hidden_states, **kwargs)
        x = own.hook_in(hidden_states) if is_hooked(own.hook_in) else hidden_states
        out = own.original_component(x)
        return own.hook_out(out) if is_hooked(own.hook_out) else out


class NativeLinear(nn.Module):
    """Mixin for a bridge's linear map: HookPoints without hooks are not called, since hundreds of
    such calls slow down a forward of few tokens."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`[..., d_in]` to `[..., d_out]`."""
        own: Any = self
        if own._suppress_next_hook_in or is_hooked(own.hook_in) or is_hooked(own.hook_out):
            return super().forward(input, *args, **kwargs)
        return own.original_component(input, *args, **kwargs)


@cache
def _native(mixin: Any, kind: Any) -> Any:
    return type(f"Native{kind.__name__}", (mixin, kind), {})


class _Stopped(Exception):
    """Ends a forward pass; `args[0]` is the residual stream."""


def _stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise _Stopped(args[0] if args else kwargs["hidden_states"])


class BridgeCache(Cache):
    """A `KVCache` with the interface of transformers' caches."""

    def __init__(self, held: KVCache) -> None:
        super().__init__(layers=[])
        self.held = held

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values, `[batch, kv_head, pos, d_head]`; those of all positions."""
        k, v = self.held[layer_idx].append(key_states.transpose(1, 2), value_states.transpose(1, 2))
        return k.transpose(1, 2), v.transpose(1, 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of cached positions, padding included."""
        return self.held[layer_idx].length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Index of the first new position."""
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """The number of keys after `query_length` new tokens, and the index of the first key."""
        return self.get_seq_length(layer_idx) + query_length, 0

    def __len__(self) -> int:
        return len(self.held.entries)


class Bridge(TransformerBridge):
    """The second engine of `shl.load_model`, see `shl.utils.model.Model`.

    Its weights are transformers' own, without a copy or processing. HookPoints have the bridge's
    names (`blocks.3.hook_out`, `blocks.3.attn.q.hook_in`) and HookedTransformer's
    (`blocks.3.hook_resid_post`, `blocks.3.attn.hook_q`), with the same activations; those inside
    the norms of q and k are `[batch, head, pos, ...]`, where a HookedTransformer has one dimension.
    `hook_attn_scores` holds the lowest finite number where attention is masked; after
    `model.enable_compatibility_mode(no_processing=True)` it holds -inf there, as in a
    HookedTransformer. No other activation depends on the mode.

    Attributes:
        decoder: the module of transformers that runs the layers and the final norm.
        stored: the parameters by the names, shapes and values under which vectors and adapters know
            the model: a HookedTransformer's where there is one for the architecture.
    """

    decoder: Any
    stored: Callable[[], Iterable[tuple[str, Tensor]]]

    @classmethod
    def of(cls, bridge: TransformerBridge) -> "Bridge":
        """Change a TransformerBridge of transformers to this class, in place."""
        bridge.__class__ = cls
        assert isinstance(bridge, cls)
        hf: Any = bridge.original_model
        vars(bridge)["decoder"] = hf.get_decoder()
        vars(bridge)["stored"] = bridge.named_parameters
        # TransformerLens reads every attribute, `positions` too, perhaps before any forward.
        vars(bridge)["_running"] = None, None, 0, 0, 0, bridge.cfg.device
        bridge.decoder.register_forward_pre_hook(
            partial(_note_positions, vars(bridge)), with_kwargs=True
        )
        kind: Any
        for block in bridge.blocks:
            kind = type(block.attn)
            block.attn.__class__ = _native(NativeAttention, kind)
        for module in bridge.modules():
            kind = type(module)
            if isinstance(module, NormalizationBridge):
                module.__class__ = _native(NativeNorm, kind)
            elif isinstance(module, LinearBridge):
                module.__class__ = _native(NativeLinear, kind)
        return bridge

    def forward(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        """Logits `[batch, pos, d_vocab]`, or the residual stream before `stop_at_layer`.

        Args:
            input: token ids or text.
            args, kwargs: those of TransformerBridge, or `attention_mask` (`[batch, pos]` of the new
                tokens, 1 where a token is real), `past_kv_cache` (a `KVCache` of earlier tokens, to
                which the new ones are added) and `stop_at_layer` (the number of layers to run,
                negative from the end).
        """
        require(
            kwargs.pop("start_at_layer", None) is None,
            "start_at_layer is given, a bridge starts at the tokens; use engine='hooked' or a hook "
            "on the layer's input.",
        )
        held, stop = kwargs.pop("past_kv_cache", None), kwargs.pop("stop_at_layer", None)
        if held is None and stop is None:
            kwargs.setdefault("use_cache", False)
            return super().forward(input, *args, **kwargs)
        mask = kwargs.pop("attention_mask", None)
        kwargs.pop("output_attentions", None)  # run_with_cache sets it, and gets them by hooks
        kwargs = {k: v for k, v in kwargs.items() if (k, v) != ("return_type", "logits")}
        used = [*args, *kwargs]
        require(
            not used, f"past_kv_cache and stop_at_layer exclude other arguments, such as {used}."
        )
        tokens = input if isinstance(input, Tensor) else self.to_tokens(input)
        n = self.cfg.n_layers
        end = n if stop is None else stop
        require(-n <= end <= n, f"stop_at_layer is {end}, it must be from {-n} to {n}.")
        residual = self._residual(tokens, mask, held, end if end >= 0 else n + end)
        if stop is not None:
            return residual
        logits = self.unembed(self.ln_final(residual))
        cap = self.cfg.output_logits_soft_cap
        return logits if cap <= 0 else cap * torch.tanh(logits / cap)

    def _residual(
        self, tokens: Tensor, mask: Tensor | None, held: KVCache | None, stop: int
    ) -> Tensor:
        settings: dict[str, Any] = {"use_cache": held is not None}
        tokens = tokens.to(self.cfg.device)
        if held is not None:
            mask = held.append_attention_mask(torch.ones_like(tokens) if mask is None else mask)
            settings[cache_argument(self.decoder)] = BridgeCache(held)
        if mask is not None:
            mask = mask.to(self.cfg.device)
            at = (mask.cumsum(1) - 1).clamp(min=0)
            settings["position_ids"] = at[:, -tokens.shape[1] :]
        last = self.ln_final if stop == self.cfg.n_layers else self.blocks[stop]
        handle = last.register_forward_pre_hook(_stop, with_kwargs=True)
        try:
            self.decoder(input_ids=tokens, attention_mask=mask, **settings)
        except _Stopped as stopped:
            return stopped.args[0]
        finally:
            handle.remove()
        raise AssertionError("the decoder runs every layer and the final norm")

    @property
    def positions(self) -> Int[Tensor, "batch pos"]:
        """Absolute positions of the tokens of the forward that is running; -1 is padding."""
        mask, given, before, batch, new, device = vars(self)["_running"]
        if mask is not None:
            return (mask.long().cumsum(1) - 1).masked_fill(mask == 0, -1)[:, -new:]
        if given is not None:
            return given.expand(batch, new)
        return torch.arange(before, before + new, device=device).expand(batch, new)

    def hooks(self, fwd_hooks: Any = (), bwd_hooks: Any = (), *args: Any, **kwargs: Any) -> Any:
        """TransformerLens's method, which ignores a name that the model does not have.

        Raises:
            ShlError: an unknown name.
        """
        self._require_known(fwd_hooks, bwd_hooks)
        return super().hooks(fwd_hooks, bwd_hooks, *args, **kwargs)

    def run_with_hooks(
        self, input: Any, fwd_hooks: Any = (), bwd_hooks: Any = (), *args: Any, **kwargs: Any
    ) -> Any:
        """TransformerLens's method, which ignores a name that the model does not have.

        Raises:
            ShlError: an unknown name.
        """
        self._require_known(fwd_hooks, bwd_hooks)
        return super().run_with_hooks(input, fwd_hooks, bwd_hooks, *args, **kwargs)

    def _require_known(self, *hooks: Any) -> None:
        known = self.hook_dict
        for name, _ in (pair for some in hooks for pair in some):
            require(
                not isinstance(name, str) or name in known,
                f"there is no HookPoint {name!r}; model.hook_dict has the {len(known)} names, such "
                "as 'blocks.0.hook_out'.",
            )

    def enable_compatibility_mode(
        self, disable_warnings: bool = False, no_processing: bool = False, *rest: Any, **kw: Any
    ) -> None:
        """TransformerLens's method; only without weight processing, which would change what
        vectors and adapters act on.

        Raises:
            ShlError: `no_processing` is False.
        """
        require(
            no_processing,
            "no_processing is False, it must be True: vectors and adapters act on transformers' "
            "own weights.",
        )
        super().enable_compatibility_mode(disable_warnings, True, *rest, **kw)


def _note_positions(
    state: dict[str, Any], _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Store what `Bridge.positions` needs, whoever runs the decoder: the bridge or transformers."""
    ids = kwargs.get("input_ids", *args[:1]) if args or "input_ids" in kwargs else None
    ids = kwargs["inputs_embeds"] if ids is None else ids
    past = kwargs.get("cache", kwargs.get("past_key_values"))
    before = 0 if past is None else int(past.get_seq_length())
    mask = kwargs.get("attention_mask")
    flat = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
    batch, new = ids.shape[:2]
    state["_running"] = flat, kwargs.get("position_ids"), before, batch, new, ids.device


@cache
def _parameters(kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def cache_argument(decoder: nn.Module) -> str:
    """The name of the cache among the arguments of a decoder of transformers."""
    kind: Any = type(decoder)
    return "cache" if "cache" in _parameters(kind) else "past_key_values"
