"""From transformers' Gemma-3 and Llama to TransformerLens: config and tensors.

TransformerLens 3.9 transposes its matrices in every forward and calls `.contiguous()`. Here each
parameter is a view of the checkpoint's own `[out, in]` storage, so that the transpose is already
contiguous and nothing is copied; shapes and values are TransformerLens's, only strides differ.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from transformer_lens import HookedTransformerConfig
from transformers import PretrainedConfig

from shl.errors import ShlError, check

ARCHITECTURES = ("gemma3", "gemma3_text", "llama")


def hooked_config(
    hf_config: PretrainedConfig, *, name: str, device: str, dtype: torch.dtype
) -> HookedTransformerConfig:
    """TransformerLens's config for a Gemma-3 or Llama config of transformers.

    Raises:
        ShlError: another architecture, or a rotary scaling that is not covered.
    """
    kind = hf_config.model_type
    check(
        kind in ARCHITECTURES,
        f"the architecture of {name} is {kind!r}, it must be one of {', '.join(ARCHITECTURES)}.",
    )
    text = hf_config.get_text_config()
    d_head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    common: dict[str, Any] = {
        "model_name": name,
        "d_model": text.hidden_size,
        "d_head": d_head,
        "n_heads": text.num_attention_heads,
        "d_mlp": text.intermediate_size,
        "n_layers": text.num_hidden_layers,
        "n_ctx": text.max_position_embeddings,
        "eps": text.rms_norm_eps,
        "d_vocab": text.vocab_size,
        "n_key_value_heads": text.num_key_value_heads,
        "normalization_type": "RMS",
        "final_rms": True,
        "gated_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_dim": d_head,
        "init_weights": False,
        "dtype": dtype,
        "device": device,
    }
    if kind == "llama":
        rope = _rope(text.rope_parameters, ("default", "llama3"), name)
        extra: dict[str, Any] = {
            "act_fn": text.hidden_act,
            "rotary_base": rope["rope_theta"],
            "original_architecture": "LlamaForCausalLM",
        }
        if rope.get("rope_type") == "llama3":
            extra |= {
                "use_NTK_by_parts_rope": True,
                "NTK_original_ctx_len": rope["original_max_position_embeddings"],
                "NTK_by_parts_low_freq_factor": rope["low_freq_factor"],
                "NTK_by_parts_high_freq_factor": rope["high_freq_factor"],
                "NTK_by_parts_factor": rope["factor"],
            }
        return HookedTransformerConfig(**common, **extra)
    everywhere = _rope(text.rope_parameters["full_attention"], ("default", "linear"), name)
    local = _rope(text.rope_parameters["sliding_attention"], ("default",), name)
    kinds = {"sliding_attention": "local", "full_attention": "global"}
    # transformers ignores attn_logit_softcapping on Gemma-3, so it is not passed on either.
    cap = text.final_logit_softcapping
    soft_cap: dict[str, Any] = {} if cap is None else {"output_logits_soft_cap": float(cap)}
    return HookedTransformerConfig(
        **common,
        **soft_cap,
        act_fn=text.hidden_activation,
        rotary_base=everywhere["rope_theta"],
        rotary_base_local=local["rope_theta"],
        rotary_scaling_factor=everywhere.get("factor", 1.0),
        attn_scale=math.sqrt(text.query_pre_attn_scalar),
        use_qk_norm=True,
        use_normalization_before_and_after=True,
        use_local_attn=True,
        window_size=text.sliding_window,
        attn_types=[kinds[layer_type] for layer_type in text.layer_types],
        original_architecture="Gemma3ForCausalLM",
    )


def _rope(rope: dict[str, Any], allowed: tuple[str, ...], name: str) -> dict[str, Any]:
    kind = rope.get("rope_type", "default")
    check(
        kind in allowed, f"the rotary scaling of {name} is {kind!r}, it must be one of {allowed}."
    )
    return rope


def converter(
    hf_config: PretrainedConfig, state: dict[str, Tensor], cfg: HookedTransformerConfig
) -> Callable[[str], Tensor | None]:
    """From a TransformerLens parameter name to its tensor, a view of the checkpoint wherever the
    values are the same; None where the architecture has no such tensor (biases)."""
    gemma = hf_config.model_type != "llama"
    embed_key = next((key for key in state if key.endswith("embed_tokens.weight")), None)
    if embed_key is None:
        raise ShlError(f"the weights of {cfg.model_name} hold no embed_tokens.weight.")
    prefix = embed_key.removesuffix("embed_tokens.weight")

    def tensor(key: str) -> Tensor:
        check(key in state, f"the weights of {cfg.model_name} hold no tensor {key}.")
        return state[key]

    def norm(key: str) -> Tensor:
        # Gemma's norms multiply by 1 + weight.
        return 1.0 + tensor(key).float() if gemma else tensor(key)

    def convert(key: str) -> Tensor | None:
        if key == "embed.W_E":
            scale = torch.tensor(cfg.d_model**0.5, dtype=cfg.dtype)
            embedding = tensor(embed_key).to(cfg.dtype)
            return embedding * scale if gemma else embedding
        if key == "unembed.W_U":
            return state.get("lm_head.weight", tensor(embed_key)).T
        if key == "ln_final.w":
            return norm(f"{prefix}norm.weight")
        if not key.startswith("blocks."):
            return None
        _, layer, part = key.split(".", 2)
        base = f"{prefix}layers.{layer}."
        norms = {
            "ln1.w": "input_layernorm",
            "ln1_post.w": "post_attention_layernorm",
            "ln2.w": "pre_feedforward_layernorm" if gemma else "post_attention_layernorm",
            "ln2_post.w": "post_feedforward_layernorm",
            "attn.q_norm.w": "self_attn.q_norm",
            "attn.k_norm.w": "self_attn.k_norm",
        }
        if part in norms:
            return norm(f"{base}{norms[part]}.weight")
        heads_out = {"attn.W_Q": "q", "attn._W_K": "k", "attn._W_V": "v"}
        heads_out |= {"attn.W_K": "k", "attn.W_V": "v"}
        if part in heads_out:
            weight = tensor(f"{base}self_attn.{heads_out[part]}_proj.weight")
            return rearrange(weight, "(head d_head) d -> head d d_head", d_head=cfg.d_head)
        if part == "attn.W_O":
            weight = tensor(f"{base}self_attn.o_proj.weight")
            return rearrange(weight, "d (head d_head) -> head d_head d", d_head=cfg.d_head)
        mlp = {"mlp.W_gate": "gate", "mlp.W_in": "up", "mlp.W_out": "down"}
        if part in mlp:
            return tensor(f"{base}mlp.{mlp[part]}_proj.weight").T
        return None

    return convert
