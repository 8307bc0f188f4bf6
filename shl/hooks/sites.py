"""Sites on a model: names, shapes, hooks and parameters.

This is the only module that asks which of TransformerLens's engines a model has.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shl.config import SITE_KINDS
from shl.fast import Bridge
from shl.utils.errors import require
from shl.utils.model import Model
from shl.utils.shapes import Float, Int

HF_NAMES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
"""The linear sites' names in transformers, within `model.layers.i`."""


@dataclass(frozen=True)
class Place:
    """Where a site's input is read and its update is added, within `blocks.i`: a module's output,
    or the argument after the colon; and its weight, with the einops pattern to `[out, in]`."""

    read: str
    added: str
    weight: str = ""
    out_in: str = "d_out d_in -> d_out d_in"


HEADS, TRANSPOSED = "head d d_head -> (head d_head) d", "d_in d_out -> d_out d_in"
PLACES = {
    "q": (
        Place("attn:query_input", "attn.hook_q", "attn.W_Q", HEADS),
        Place("attn.q.hook_in", "attn.q.hook_out", "attn.q.weight"),
    ),
    "k": (
        Place("attn:query_input", "attn.hook_k", "attn._W_K", HEADS),
        Place("attn.k.hook_in", "attn.k.hook_out", "attn.k.weight"),
    ),
    "v": (
        Place("attn:query_input", "attn.hook_v", "attn._W_V", HEADS),
        Place("attn.v.hook_in", "attn.v.hook_out", "attn.v.weight"),
    ),
    "o": (
        Place("attn.hook_z", "attn", "attn.W_O", "head d_head d -> d (head d_head)"),
        Place("attn.o.hook_in", "attn.o.hook_out", "attn.o.weight"),
    ),
    "gate": (
        Place("mlp:x", "mlp.hook_pre", "mlp.W_gate", TRANSPOSED),
        Place("mlp.gate.hook_in", "mlp.gate.hook_out", "mlp.gate.weight"),
    ),
    "up": (
        Place("mlp:x", "mlp.hook_pre_linear", "mlp.W_in", TRANSPOSED),
        Place("mlp.in.hook_in", "mlp.in.hook_out", "mlp.in.weight"),
    ),
    "down": (
        Place("mlp.hook_post", "mlp", "mlp.W_out", TRANSPOSED),
        Place("mlp.out.hook_in", "mlp.out.hook_out", "mlp.out.weight"),
    ),
    "resid": (
        Place("hook_resid_post", "hook_resid_post"),
        Place("hook_out", "hook_out"),
    ),
}
"""A column for a HookedTransformer (TransformerLens 3.9) and one for a TransformerBridge. Together,
input and output equal an update of the weights.

In the first, modules are hooked where no HookPoint has the linear's value: `hook_attn_out` and
`hook_mlp_out` come after Gemma's post-norms, `hook_normalized` before the norm's learned scale.
`hook_q` and `hook_k` come before the q/k norms, as required. In the second, every linear has its
own HookPoints."""


@dataclass(frozen=True)
class Site:
    """One place for a low-rank update: `kind` at `layer`, from `d_in` to `d_out` features.

    Example:
        >>> Site("down", 3, 2048, 640).name
        'blocks.3.down'
    """

    kind: str
    layer: int
    d_in: int
    d_out: int

    @property
    def name(self) -> str:
        """The key of the site's factors in an adapter."""
        return f"blocks.{self.layer}.{self.kind}"

    @property
    def hooks(self) -> tuple[str, str]:
        """Full names of a HookedTransformer's hooks at the site's input and output; files have
        these, whichever engine wrote them.

        Example:
            >>> Site("gate", 3, 640, 2048).hooks
            ('blocks.3.mlp:x', 'blocks.3.mlp.hook_pre')
        """
        place = PLACES[self.kind][0]
        return f"blocks.{self.layer}.{place.read}", f"blocks.{self.layer}.{place.added}"


def sites_of(model: Model, kinds: Sequence[str], layers: Sequence[int]) -> tuple[Site, ...]:
    """The sites of `kinds` at `layers`, in the order of the forward pass.

    Raises:
        ShlError: a kind is unknown, a layer is out of range, or the model's MLP is not gated (as
            those of Gemma and Llama are).

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> [s.name for s in sites_of(tiny_gemma(), ["o", "q"], [1])]
        ['blocks.1.q', 'blocks.1.o']
    """
    cfg = model.cfg
    require(bool(cfg.gated_mlp), "the model's MLP is not gated, it must be as in Gemma and Llama.")
    for kind in kinds:
        require(kind in SITE_KINDS, f"site {kind!r} is unknown, the sites are {SITE_KINDS}.")
    check_layers(model, layers)
    heads = cfg.n_heads * cfg.d_head
    kv_heads = (cfg.n_key_value_heads or cfg.n_heads) * cfg.d_head
    assert cfg.d_mlp is not None
    shapes = {
        "q": (cfg.d_model, heads),
        "k": (cfg.d_model, kv_heads),
        "v": (cfg.d_model, kv_heads),
        "o": (heads, cfg.d_model),
        "gate": (cfg.d_model, cfg.d_mlp),
        "up": (cfg.d_model, cfg.d_mlp),
        "down": (cfg.d_mlp, cfg.d_model),
        "resid": (cfg.d_model, cfg.d_model),
    }
    return tuple(
        Site(kind, layer, *shapes[kind])
        for layer in sorted(set(layers))
        for kind in SITE_KINDS
        if kind in kinds
    )


def check_layers(model: Model, layers: Sequence[int]) -> None:
    """Raise unless every layer index exists in the model."""
    for layer in layers:
        require(
            0 <= layer < model.cfg.n_layers,
            f"layer {layer} is out of range, {model.cfg.model_name} has layers 0 to "
            f"{model.cfg.n_layers - 1}.",
        )


def band(model: Model, low: float, high: float) -> tuple[int, ...]:
    """Layers between the fractions `low` and `high` of the depth, both ends included.

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> band(tiny_gemma(n_layers=6), 1 / 3, 2 / 3)
        (2, 3, 4)
    """
    n = model.cfg.n_layers
    return tuple(range(round(low * n), min(n - 1, round(high * n)) + 1))


def block_of(model: Model, layer: int) -> Any:
    """The block of a layer; typed Any, because torch types attributes as Tensor | Module."""
    return model.blocks[layer]


def _place(model: Model, kind: str) -> Place:
    return PLACES[kind][isinstance(model, Bridge)]


def residual_after(model: Model, layer: int) -> nn.Module:
    """The HookPoint of the residual stream after `layer`, `[batch, pos, d_model]`."""
    check_layers(model, [layer])
    return block_of(model, layer).get_submodule(_place(model, "resid").added)


def device_of(model: Model, layer: int) -> torch.device:
    """The device of a layer's weights."""
    return next(block_of(model, layer).parameters()).device


def linear_input(model: Model, site: Site) -> tuple[nn.Module, str | None]:
    """The module and argument that are a site's input; the argument None is the module's output."""
    path, _, argument = _place(model, site.kind).read.partition(":")
    return block_of(model, site.layer).get_submodule(path), argument or None


def linear_output(model: Model, site: Site) -> nn.Module:
    """The module whose output is a site's output, before any norm."""
    return block_of(model, site.layer).get_submodule(_place(model, site.kind).added)


def as_linear(model: Model, site: Site) -> tuple[nn.Parameter, str, dict[str, int]]:
    """A linear site's parameter, and the einops pattern and sizes that rearrange it to `[out, in]`
    (as a view).

    Example:
        >>> from einops import rearrange
        >>> from shl.models.tiny import tiny_gemma
        >>> model = tiny_gemma()
        >>> parameter, out_in, sizes = as_linear(model, sites_of(model, ["q"], [0])[0])
        >>> rearrange(parameter, out_in, **sizes).shape
        torch.Size([64, 32])
    """
    require(
        site.kind in HF_NAMES,
        f"{site.name} has no weight, the linear sites are {', '.join(HF_NAMES)}.",
    )
    place = _place(model, site.kind)
    component, _, weight = place.weight.rpartition(".")
    parameter = getattr(block_of(model, site.layer).get_submodule(component), weight)
    sizes = {"d_head": model.cfg.d_head} if "d_head" in place.out_in else {}
    return parameter, place.out_in, sizes


def token_positions(
    model: Model, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Int[Tensor, "batch pos"]:
    """Absolute positions of a block's input tokens, given the block's arguments; -1 is padding.
    Without an attention mask no token is padding."""
    if isinstance(model, Bridge):
        return model.positions
    residual = kwargs.get("resid_pre", *args[:1])
    mask, entry = kwargs.get("attention_mask"), kwargs.get("past_kv_cache_entry")
    batch, new = residual.shape[:2]
    if mask is not None:
        return (mask.cumsum(1) - 1).masked_fill(mask == 0, -1)[:, -new:]
    before = entry.past_keys.shape[1] if entry is not None else 0
    return torch.arange(before, before + new, device=residual.device).expand(batch, new)


def base_parameters(model: Model) -> Iterable[tuple[str, Tensor]]:
    """The base model's parameters by the names under which its hash has them."""
    return model.stored() if isinstance(model, Bridge) else model.named_parameters()


def wrapped_by(model: Model) -> Any:
    """The model of transformers whose modules `model` runs; None for a HookedTransformer."""
    return model.original_model if isinstance(model, Bridge) else None


def engine_name(model: Model) -> str:
    """TransformerLens's class, and for a bridge whether its compatibility mode is on."""
    if not isinstance(model, Bridge):
        return "HookedTransformer"
    return f"TransformerBridge, compatibility mode {'on' if model.compatibility_mode else 'off'}"


def norm_scale(model: Model, name: str) -> Float[Tensor, "..."]:
    """The learned scale of a norm by its path (`ln_final`, `blocks.0.ln1_post`), fp32; 1 if the
    model has no such norm."""
    norm: Any = model
    for part in name.split("."):
        norm = getattr(norm, part, None)
    scale = getattr(norm, "w", torch.ones(())).float()
    # A bridge has Gemma's own weights, to which its norms add 1.
    offset = isinstance(model, Bridge) and norm is not None and model.cfg.rmsnorm_uses_offset
    return 1 + scale if offset else scale


def readout(model: Model) -> dict[str, Any]:
    """Bias and soft cap of the logits, as keyword arguments of the functions of `shl.kl`."""
    # TransformerLens writes -1 for no soft cap.
    return {"bias": model.b_U, "soft_cap": max(0.0, float(model.cfg.output_logits_soft_cap))}


def final_hidden(model: Model, residual: Tensor) -> Tensor:
    """The final norm of residual vectors `[n, d_model]`, in the dtype and on the device of
    `W_U`."""
    return model.ln_final(residual[None])[0].to(model.W_U)
