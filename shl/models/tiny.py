"""A tiny random Gemma-3 in memory, for tests and examples only."""

import string

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from shl.models.load import build_bridge, build_model, choose_engine
from shl.utils.model import Model


def tiny_tokenizer(*, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per printable ASCII character and `<unk>`; 104 tokens in all."""
    special = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    vocab = {token: i for i, token in enumerate([*special.values(), *string.printable])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    raw.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_hf(*, n_layers: int = 4, seed: int = 0) -> Gemma3ForCausalLM:
    """A random transformers Gemma-3: d_model 32, 4 heads with 1 kv head, window 8, every third
    layer global, and random norm weights."""
    layer_types = ["full_attention" if i % 3 == 2 else "sliding_attention" for i in range(n_layers)]
    config = Gemma3TextConfig(
        vocab_size=len(string.printable) + 4,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=8,
        layer_types=layer_types,
        max_position_embeddings=512,
        query_pre_attn_scalar=16,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    config._attn_implementation = "eager"
    generator = torch.Generator().manual_seed(seed)
    model = Gemma3ForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        scale = 0.3 if "norm" in name else 0.15
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def tiny_gemma(
    *,
    n_layers: int = 4,
    seed: int = 0,
    chat_template: str | None = None,
    fast: bool = True,
    engine: str = "auto",
) -> Model:
    """The model of `tiny_hf` on either engine, with a character tokenizer.

    Example:
        >>> model = tiny_gemma()
        >>> model("hi").shape
        torch.Size([1, 3, 104])
    """
    hf = tiny_hf(n_layers=n_layers, seed=seed)
    tokenizer = tiny_tokenizer(chat_template=chat_template)
    if choose_engine(engine) == "bridge":
        return build_bridge(hf, tokenizer, name="tiny-gemma")
    return build_model(hf.config, hf.state_dict(), tokenizer, name="tiny-gemma", fast=fast)
