"""`shl.check` passes on correct models and names the failed check of incorrect ones."""

import pytest
import torch
from helpers import hook_count, save

from shl.analysis.check import check
from shl.fast.kv_cache import LayerCache
from shl.hooks.sites import engine_name
from shl.models.load import load_model
from shl.models.tiny import tiny_hf


@pytest.fixture
def loaded(tmp_path):
    """A model of each test's own, loaded from a folder."""
    return load_model(str(save(tmp_path, tiny_hf())), device="cpu")


def failed(report):
    return [line.what for line in report.lines if not line.ok]


def test_model_from_a_folder_passes_all_checks(loaded):
    report = check(loaded)
    assert report.ok, str(report)
    assert len(report.lines) == 8
    assert "FAILED" not in str(report)
    assert str(report).startswith(f"{loaded.cfg.model_name} on a {engine_name(loaded)}\n")
    assert hook_count(loaded) == 0


def test_parity_is_not_checked_without_a_source(model):
    report = check(model)
    assert failed(report) == ["logits equal transformers"]
    assert not report.ok
    assert "NOT CHECKED" in str(report)


def test_weights_that_differ_from_transformers_fail(loaded):
    loaded.ln_final.w.data *= 1.1
    report = check(loaded)
    assert failed(report) == ["logits equal transformers"]
    assert "FAILED" in str(report)


def test_attention_that_loses_cached_keys_fails(gemma, monkeypatch):
    real = LayerCache.append

    def append(self, k, v):
        keys, values = real(self, k, v)
        return torch.zeros_like(keys), values

    monkeypatch.setattr(LayerCache, "append", append)
    assert "cached, padded logits equal whole ones" in failed(check(gemma))


def test_hook_of_the_caller_stays_and_is_no_failure(gemma):
    with gemma.hooks(fwd_hooks=[("blocks.0.hook_resid_post", lambda h, hook: h * 1.01)]):
        assert failed(check(gemma)) == ["logits equal transformers"]
        assert hook_count(gemma) == 1
