"""Sites on a HookedTransformer (Gemma-3 and Llama): names, shapes, hooks and parameters."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformer_lens import HookedTransformer

from shl.config import SITE_KINDS
from shl.utils.errors import require

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

HOOKS = {
    "q": ("attn:query_input", "attn.hook_q"),
    "k": ("attn:query_input", "attn.hook_k"),
    "v": ("attn:query_input", "attn.hook_v"),
    "o": ("attn.hook_z", "attn"),
    "gate": ("mlp:x", "mlp.hook_pre"),
    "up": ("mlp:x", "mlp.hook_pre_linear"),
    "down": ("mlp.hook_post", "mlp"),
    "resid": ("hook_resid_post", "hook_resid_post"),
}
"""Where a site's input is read and its update is added, within `blocks.i`: a module's output, or
the argument after the colon. Together they equal an update of the weights (TransformerLens 3.9).

Modules are hooked where no HookPoint has the linear's value: `hook_attn_out` and `hook_mlp_out`
come after Gemma's post-norms, `hook_normalized` before the norm's learned scale. `hook_q` and
`hook_k` come before the q/k norms, as required."""

WEIGHTS = {
    "q": ("W_Q", "head d d_head -> (head d_head) d"),
    "k": ("_W_K", "head d d_head -> (head d_head) d"),
    "v": ("_W_V", "head d d_head -> (head d_head) d"),
    "o": ("W_O", "head d_head d -> d (head d_head)"),
    "gate": ("W_gate", "d_in d_out -> d_out d_in"),
    "up": ("W_in", "d_in d_out -> d_out d_in"),
    "down": ("W_out", "d_in d_out -> d_out d_in"),
}
"""A linear site's weight in its attention or MLP, and the einops pattern to `[out, in]`."""


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
        """Full names of the hooks at the site's input and output.

        Example:
            >>> Site("gate", 3, 640, 2048).hooks
            ('blocks.3.mlp:x', 'blocks.3.mlp.hook_pre')
        """
        read, added = HOOKS[self.kind]
        return f"blocks.{self.layer}.{read}", f"blocks.{self.layer}.{added}"


def sites_of(
    model: HookedTransformer, kinds: Sequence[str], layers: Sequence[int]
) -> tuple[Site, ...]:
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


def check_layers(model: HookedTransformer, layers: Sequence[int]) -> None:
    """Raise unless every layer index exists in the model."""
    for layer in layers:
        require(
            0 <= layer < model.cfg.n_layers,
            f"layer {layer} is out of range, {model.cfg.model_name} has layers 0 to "
            f"{model.cfg.n_layers - 1}.",
        )


def band(model: HookedTransformer, low: float, high: float) -> tuple[int, ...]:
    """Layers between the fractions `low` and `high` of the depth, both ends included.

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> band(tiny_gemma(n_layers=6), 1 / 3, 2 / 3)
        (2, 3, 4)
    """
    n = model.cfg.n_layers
    return tuple(range(round(low * n), min(n - 1, round(high * n)) + 1))


def block_of(model: HookedTransformer, layer: int) -> Any:
    """The block of a layer; typed Any, because torch types attributes as Tensor | Module."""
    return model.blocks[layer]


def residual_after(model: HookedTransformer, layer: int) -> nn.Module:
    """The HookPoint of the residual stream after `layer`, `[batch, pos, d_model]`."""
    check_layers(model, [layer])
    return block_of(model, layer).hook_resid_post


def linear_input(model: HookedTransformer, site: Site) -> tuple[nn.Module, str | None]:
    """The module and argument that are a site's input; the argument None is the module's output."""
    path, _, argument = HOOKS[site.kind][0].partition(":")
    return block_of(model, site.layer).get_submodule(path), argument or None


def linear_output(model: HookedTransformer, site: Site) -> nn.Module:
    """The module whose output is a site's output, before any norm."""
    return block_of(model, site.layer).get_submodule(HOOKS[site.kind][1])


def as_linear(model: HookedTransformer, site: Site) -> tuple[nn.Parameter, str, dict[str, int]]:
    """A linear site's parameter, and the einops pattern and sizes that rearrange it to `[out, in]`
    (as a view).

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> model = tiny_gemma()
        >>> as_linear(model, sites_of(model, ["q"], [0])[0])[1]
        'head d d_head -> (head d_head) d'
    """
    require(
        site.kind in WEIGHTS,
        f"{site.name} has no weight, the linear sites are {', '.join(WEIGHTS)}.",
    )
    weight, out_in = WEIGHTS[site.kind]
    component = HOOKS[site.kind][1].partition(".")[0]  # attention or MLP
    parameter = getattr(block_of(model, site.layer).get_submodule(component), weight)
    return parameter, out_in, {"d_head": model.cfg.d_head} if "d_head" in out_in else {}


def readout(model: HookedTransformer) -> dict[str, Any]:
    """Bias and soft cap of the logits, as keyword arguments of the functions of `shl.kl`."""
    # TransformerLens writes -1 for no soft cap.
    return {"bias": model.b_U, "soft_cap": max(0.0, float(model.cfg.output_logits_soft_cap))}


def final_hidden(model: HookedTransformer, residual: Tensor) -> Tensor:
    """The final norm of residual vectors `[n, d_model]`, in the dtype of `W_U`."""
    return model.ln_final(residual[None])[0].to(model.W_U.dtype)
