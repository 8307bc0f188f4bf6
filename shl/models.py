"""`load_model`: a name or a folder becomes a real HookedTransformer, laid out for speed.

TransformerLens 3.9 transposes its matrices in every forward and calls `.contiguous()`. Here each
parameter is a view of the checkpoint's own `[out, in]` storage, so that the transpose is already
contiguous and nothing is copied; shapes and values are TransformerLens's, only strides differ.
"""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from shl.attention import speed_up
from shl.errors import ShlError, check
from shl.weights import model_folder

ARCHITECTURES = ("gemma3", "gemma3_text", "llama")


def load_model(
    name: str = "gemma-3-270m",
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> HookedTransformer:
    """Load a model with all parameters frozen.

    Args:
        name: an embedded model (`gemma-3-270m`, `smollm2-135m-instruct`), a hub name
            (`google/gemma-3-1b-it`), or the path of a local Hugging Face folder.
        device: where it lives; None is CUDA if there is any, else the CPU.
        dtype: None is fp32 on the CPU and bf16 on CUDA.

    Returns:
        A HookedTransformer without weight processing: its logits are transformers' logits.

    Raises:
        ShlError: unknown model, no access, wrong checksum, no room, or an architecture other
            than Gemma-3 and Llama.

    Example:
        >>> model = load_model("gemma-3-270m")  # doctest: +SKIP
        >>> model("The capital of France is").shape  # doctest: +SKIP
        torch.Size([1, 6, 262144])
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    folder = model_folder(name)
    try:
        hf_config = AutoConfig.from_pretrained(folder)
        state = _read_safetensors(folder)
        tokenizer = _read_tokenizer(folder)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if isinstance(error, ShlError):
            raise
        reason = (str(error).splitlines() or [""])[0].rstrip(".:")
        raise ShlError(
            f"the model folder {folder} cannot be read ({type(error).__name__}: {reason})."
        ) from error
    return build_model(hf_config, state, tokenizer, name=name, device=device, dtype=dtype)


def build_model(
    hf_config: PretrainedConfig,
    state: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    name: str = "custom",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> HookedTransformer:
    """A HookedTransformer from a transformers config, its state dict and its tokenizer.

    Raises:
        ShlError: an architecture other than Gemma-3 and Llama, or a tensor that is missing, has
            another shape, or is not finite where it is looked at.
    """
    cfg = hooked_config(hf_config, name=name, device=device, dtype=dtype)
    if tokenizer is not None:
        bos = tokenizer.bos_token_id
        cfg.default_prepend_bos = bos is not None and tokenizer.encode("")[:1] == [bos]
    with warnings.catch_warnings():
        # HookedTransformer announces its removal in 4.0; the version is pinned below that.
        warnings.simplefilter("ignore", DeprecationWarning)
        model = HookedTransformer(cfg, _with_bos(tokenizer), move_to_device=False)
    convert = _converter(hf_config, state, cfg)
    for key, parameter in model.named_parameters():
        value = convert(key)
        if value is None:
            parameter.data = torch.zeros(parameter.shape, dtype=dtype, device=device)
            continue
        check(
            value.shape == parameter.shape,
            f"the weights of {key} have shape {tuple(value.shape)}, the config of {name} asks "
            f"for {tuple(parameter.shape)}.",
        )
        parameter.data = value.to(device=device, dtype=dtype)
    for module in model.modules():
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else buffer.to(device)
    speed_up(model)
    model.requires_grad_(False)
    return model.eval()


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
    return HookedTransformerConfig(
        **common,
        **({} if cap is None else {"output_logits_soft_cap": float(cap)}),
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


def _converter(
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


def _read_safetensors(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        check(
            all(Path(name).name == name for name in names),
            f"{index} names a file outside its folder.",
        )
    else:
        names = ["model.safetensors"]
    state: dict[str, Tensor] = {}
    for name in names:
        state |= load_file(folder / name)
    return state


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    check(
        tokenizer.bos_token is not None or tokenizer.eos_token is not None,
        f"the tokenizer in {folder} has neither a bos nor an eos token.",
    )
    return tokenizer


def _with_bos(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase | None:
    """TransformerLens wants a tokenizer that prepends BOS and reads it from disk a second time
    unless it is marked as doing so; Gemma's does."""
    if tokenizer is not None and tokenizer.encode("")[:1] == [tokenizer.bos_token_id]:
        tokenizer.add_bos_token = True
        tokenizer.init_kwargs["add_bos_token"] = True
        tokenizer.init_kwargs.setdefault("name_or_path", "")
    return tokenizer
