"""PEFT and transformers load exported folders and compute the same logits."""

import json
import warnings

import pytest
import torch
from helpers import random_adapter, tiny_llama_hf, tokens_of
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from shl.config import LINEAR_SITES
from shl.hooks.bake import baked
from shl.models.export import export_hf, export_peft
from shl.models.load import build_model
from shl.models.tiny import tiny_hf, tiny_tokenizer
from shl.utils.errors import ShlError

TOKENS = tokens_of(2, 20)


def rounds(model, sites=LINEAR_SITES):
    """Three rounds with different ranks and scales; the last has other sites than the first two."""
    return [
        random_adapter(model, sites, (0, 2), seed=0, alpha=1.5, rank=1, size=0.12),
        random_adapter(model, sites, (0, 2), seed=1, alpha=3.0, rank=2, size=0.12),
        random_adapter(model, sites[:2], (1,), seed=2, alpha=4.5, rank=3, size=0.12),
    ]


@pytest.fixture(params=[tiny_hf, tiny_llama_hf])
def pair(request):
    hf = request.param()
    return build_model(hf.config, hf.state_dict(), tiny_tokenizer()), hf


def test_peft_loads_all_rounds_as_one_adapter_with_equal_logits(pair, tmp_path):
    model, hf = pair
    adapters = rounds(model)
    export_peft(adapters, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    # Ranks add up per site: 1 + 2 at layers 0 and 2, 3 at layer 1.
    assert (config["r"], config["rank_pattern"]) == (3, {})
    assert len(tensors) == 2 * (2 * 7 + 2)
    assert {len(t) for key, t in tensors.items() if "lora_A" in key} == {3}
    plain = hf(TOKENS).logits
    with warnings.catch_warnings():
        # PEFT uses a deprecated name of transformers.
        warnings.simplefilter("ignore", FutureWarning)
        peft = PeftModel.from_pretrained(hf, tmp_path).eval()
    with baked(model, adapters):
        expected = model(TOKENS)
    got = peft(TOKENS).logits
    assert (got - expected).abs().max() <= 1e-4
    assert (got - plain).abs().max() > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_folder_loads_and_has_the_reported_drift(pair, tmp_path, dtype):
    model, hf = pair
    hf.save_pretrained(tmp_path / "base")
    adapters = rounds(model)
    text = "hello there"
    drift = export_hf(model, adapters, tmp_path / "out", tmp_path / "base", dtype=dtype, text=text)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype).eval()
    tokens = model.to_tokens(text)
    with baked(model, adapters):
        expected = model(tokens).log_softmax(-1)
    with torch.no_grad():
        off = (merged(tokens).logits.float().log_softmax(-1) - expected).abs().max()
    assert drift.largest == pytest.approx(float(off), abs=1e-6)
    assert drift.largest <= (1e-4 if dtype == torch.float32 else 0.5)
    if dtype == torch.bfloat16:
        assert drift.largest > 1e-4
        assert drift.mean_kl > 0
    assert (model(tokens).log_softmax(-1) - expected).abs().max() > 0.05


def test_residual_site_is_rejected_and_drift_does_not_depend_on_active_hooks(pair, tmp_path):
    model, hf = pair
    hf.save_pretrained(tmp_path / "source")
    residual = [random_adapter(model, ["q", "resid"], (0,), rank=1)]
    with pytest.raises(ShlError, match=r"blocks\.0\.resid is on the residual stream"):
        export_peft(residual, tmp_path / "out")
    with pytest.raises(ShlError, match=r"blocks\.0\.resid is on the residual stream"):
        export_hf(model, residual, tmp_path / "out", tmp_path / "source")
    assert not (tmp_path / "out").exists()
    adapters = rounds(model)[:1]
    plain = export_hf(model, adapters, tmp_path / "plain", tmp_path / "source")
    halve = [("blocks.1.hook_resid_post", lambda h, hook: 0.5 * h)]
    with model.hooks(fwd_hooks=halve), baked(model, rounds(model)[2:]):
        hooked = export_hf(model, adapters, tmp_path / "hooked", tmp_path / "source")
        assert hooked == plain
        assert len(model.hook_dict["blocks.1.hook_resid_post"]._forward_hooks) == 1
    assert plain.largest < 1e-4
