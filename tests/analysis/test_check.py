"""`shl.check` passes on models that are right, and names what is wrong with those that are not."""

import pytest
import torch
from helpers import hook_count

from shl.analysis.check import check
from shl.models.load import load_model
from shl.models.tiny import tiny_hf, tiny_tokenizer


@pytest.fixture
def folder(tmp_path):
    tiny_hf().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


def failed(report):
    return [line.what for line in report.lines if not line.ok]


def test_a_model_from_a_folder_passes_everything(folder):
    model = load_model(folder, device="cpu")
    report = check(model)
    assert report.ok, str(report)
    assert len(report.lines) == 8
    assert "FAILED" not in str(report)
    assert hook_count(model) == 0


def test_without_its_source_parity_is_not_checked_and_says_so(model):
    report = check(model)
    assert failed(report) == ["logits equal transformers"]
    assert not report.ok
    assert "NOT CHECKED" in str(report)


def test_other_weights_than_transformers_fail(folder):
    model = load_model(folder, device="cpu")
    model.ln_final.w.data *= 1.1
    assert failed(check(model)) == ["logits equal transformers"]
    assert "FAILED" in str(check(model))


def test_attention_that_forgets_its_cache_fails(gemma, monkeypatch):
    from shl.fast.kv_cache import LayerCache

    real = LayerCache.append

    def forget(self, k, v):
        keys, values = real(self, k, v)
        return torch.zeros_like(keys), values

    monkeypatch.setattr(LayerCache, "append", forget)
    assert "cached, padded logits equal whole ones" in failed(check(gemma))


def test_a_hook_of_the_callers_stays_and_is_no_failure(gemma):
    with gemma.hooks(fwd_hooks=[("blocks.0.hook_resid_post", lambda h, hook: h * 1.01)]):
        assert failed(check(gemma)) == ["logits equal transformers"]
        assert hook_count(gemma) == 1
