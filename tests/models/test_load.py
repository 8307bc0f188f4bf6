"""Logits equal those of transformers, and the memory layout needs no copies."""

import copy

import pytest
import torch
from einops import rearrange
from helpers import fill, tiny_llama_hf, tokens_of
from tokenizers import processors
from transformers import Gemma3Config, Gemma3ForCausalLM

from shl.models.load import build_model
from shl.models.tiny import tiny_hf, tiny_tokenizer
from shl.models.weights import hooked_config
from shl.utils.errors import ShlError

pytestmark = pytest.mark.hooked

TOKENS = tokens_of(2, 40)  # five windows of 8


def gemma_with(**changes):
    config = copy.deepcopy(tiny_hf().config)
    for key, value in changes.items():
        setattr(config, key, value)
    hf = Gemma3ForCausalLM(config).eval().requires_grad_(False)
    fill(hf, seed=2)
    return hf


def rope(everywhere):
    local = {"rope_type": "default", "rope_theta": 1e4}
    return {"full_attention": {"rope_theta": 1e6, **everywhere}, "sliding_attention": local}


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES = {
    "gemma": tiny_hf,
    "gemma, global positions scaled": lambda: gemma_with(
        rope_parameters=rope({"rope_type": "linear", "factor": 8.0})
    ),
    "gemma, another attention scale": lambda: gemma_with(query_pre_attn_scalar=24),
    "gemma, logits capped": lambda: gemma_with(final_logit_softcapping=3.0),
    "llama": tiny_llama_hf,
    "llama, tied": lambda: tiny_llama_hf(tie_word_embeddings=True),
    "llama, other head width": lambda: tiny_llama_hf(head_dim=16),
    "llama, scaled by parts": lambda: tiny_llama_hf(rope_parameters=LLAMA3),
}


def build(hf, **settings):
    return build_model(hf.config, hf.state_dict(), None, **settings)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case):
    hf = CASES[case]()
    expected = hf(TOKENS).logits
    assert expected.std() > 0.1
    assert (build(hf)(TOKENS) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("make", [tiny_hf, tiny_llama_hf])
def test_padded_rows_equal_transformers_without_padding(make):
    hf = make()
    padded, mask = TOKENS.clone(), torch.ones_like(TOKENS)
    padded[0, :13], mask[0, :13] = 0, 0
    got = build(hf)(padded, attention_mask=mask)
    assert (got[0, 13:] - hf(TOKENS[:1, 13:]).logits[0]).abs().max() <= 1e-4
    assert (got[1] - hf(TOKENS[1:]).logits[0]).abs().max() <= 1e-4


def test_memory_layout_does_not_change_the_output(model):
    stock = copy.deepcopy(model)
    for parameter in stock.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    assert not model.W_U.is_contiguous()
    assert stock.W_U.is_contiguous()
    one, two = (m.run_with_cache(TOKENS) for m in (model, stock))
    assert torch.equal(one[0], two[0])
    assert all(torch.equal(one[1][name], two[1][name]) for name in one[1])


def test_parameters_are_frozen_and_transposes_of_transformerlens_are_views(model):
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    heads = "head d d_head -> (head d_head) d"
    views = [(model.unembed.W_U, model.unembed.W_U.T)]
    for block in model.blocks:
        attn, mlp = block.attn, block.mlp
        views += [(w, rearrange(w, heads)) for w in (attn.W_Q, attn._W_K, attn._W_V)]
        views += [(attn.W_O, rearrange(attn.W_O, "head d_head d -> d (head d_head)"))]
        views += [(w, w.T) for w in (mlp.W_gate, mlp.W_in, mlp.W_out)]
    for parameter, transposed in views:
        assert transposed.is_contiguous()
        assert transposed.data_ptr() == parameter.data_ptr()


def test_dtype_applies_to_parameters_and_logits():
    model = build(tiny_hf(), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(TOKENS).dtype == torch.bfloat16


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_multimodal_checkpoint_loads_its_language_model(prefix):
    hf = tiny_hf()
    config = Gemma3Config(text_config=hf.config.to_dict())
    text = {k: v for k, v in hf.state_dict().items() if k.startswith("model.")}
    state = {"vision_tower.embeddings.weight": torch.ones(3)}
    state |= {prefix + key.removeprefix("model."): value for key, value in text.items()}
    model = build_model(config, state, None)
    for (name, one), two in zip(model.named_parameters(), build(hf).parameters(), strict=True):
        assert torch.equal(one, two), name


def test_unknown_rotary_scaling_is_rejected():
    config = gemma_with(rope_parameters=rope({"rope_type": "linear", "factor": 8.0})).config
    config.rope_parameters["full_attention"]["rope_type"] = "yarn"
    with pytest.raises(ShlError, match="rotary scaling of x is 'yarn'"):
        hooked_config(config, name="x", device="cpu", dtype=torch.float32)


def test_tokenizer_that_does_not_prepend_bos_is_unchanged():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    hf = tiny_hf()
    model = build_model(hf.config, hf.state_dict(), tokenizer)
    assert model.tokenizer is tokenizer
    assert len(model.tokenizer.encode("hi")) == 2
    assert not model.cfg.default_prepend_bos
