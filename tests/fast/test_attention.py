"""The fast attention equals TransformerLens's own, and every hook fires on it."""

import copy

import pytest
import torch
from helpers import stock, tokens_of
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

from shl.fast import KVCache
from shl.fast.attention import FastAttention

TOKENS = tokens_of(3, 30)  # Gemma's window is 8
PADDED = torch.ones_like(TOKENS)
PADDED[0, :11], PADDED[1, :3] = 0, 0
GAP = PADDED.clone()
GAP[2, 12:15] = 0  # padding between two texts


def difference(got, expected, mask=None):
    where = (slice(None),) * 2 if mask is None else mask.bool()
    return float((got[where] - expected[where]).abs().max())


@pytest.mark.parametrize("mask", [None, torch.ones_like(TOKENS), PADDED, GAP])
def test_logits_equal_stock(model, mask):
    got = model(TOKENS, attention_mask=mask)
    with stock(model):
        expected = model(TOKENS, attention_mask=mask)
    assert expected.std() > 0.1
    assert difference(got, expected, mask) <= 1e-5
    assert bool(torch.isfinite(got).all())


@pytest.mark.parametrize("mask", [torch.ones_like(TOKENS), PADDED, GAP])
@pytest.mark.parametrize("cuts", [(29,), (12, 13, 14, 15, 30), (5, 20, 30), (1, 2, 3)])
@pytest.mark.parametrize("capacity", [0, 64])
def test_cached_forwards_equal_the_whole(model, mask, cuts, capacity):
    whole = model(TOKENS, attention_mask=mask)
    cache = KVCache.empty(model, 3, capacity)
    start = 0
    for end in (*cuts, 30):
        if start == end:
            continue
        part, new = TOKENS[:, start:end], mask[:, start:end]
        got = model(part, attention_mask=new, past_kv_cache=cache)
        assert difference(got, whole[:, start:end], new) <= 1e-4
        start = end
        assert cache.length == end


def test_copied_rows_of_a_cache_are_independent(model):
    cache = KVCache.empty(model, 3, 10)
    model(TOKENS[:, :10], attention_mask=PADDED[:, :10], past_kv_cache=cache)
    order = torch.tensor([2, 0, 2])
    other = cache.rows(order, 12)
    grown = model(TOKENS[order, 10:], attention_mask=PADDED[order, 10:], past_kv_cache=other)
    same = model(TOKENS[:, 10:], attention_mask=PADDED[:, 10:], past_kv_cache=cache)
    whole = model(TOKENS, attention_mask=PADDED)[:, 10:]
    assert difference(same, whole, PADDED[:, 10:]) <= 1e-4
    assert difference(grown, whole[order], PADDED[order, 10:]) <= 1e-4


@pytest.mark.parametrize(
    ("gone", "order"),
    [([0], [2, 1]), ([1], [0, 2]), ([2], [0, 1]), ([0, 1], [2]), ([0, 2], [1]), ([], [0, 1, 2])],
)
def test_dropping_rows_in_place_keeps_the_others(model, gone, order):
    cache = KVCache.empty(model, 3, 30)
    model(TOKENS[:, :10], attention_mask=PADDED[:, :10], past_kv_cache=cache)
    stores = [entry.keys.data_ptr() for entry in cache.entries]
    assert cache.drop(gone) == order
    got = model(TOKENS[order, 10:], attention_mask=PADDED[order, 10:], past_kv_cache=cache)
    whole = model(TOKENS, attention_mask=PADDED)[order, 10:]
    assert difference(got, whole, PADDED[order, 10:]) <= 1e-4
    assert [entry.keys.data_ptr() for entry in cache.entries] == stores  # nothing was copied anew


@pytest.mark.parametrize("inference", [False, True])
def test_mask_changed_in_place_takes_effect(model, inference):
    with torch.inference_mode(inference):
        mask = torch.ones_like(TOKENS)
        model(TOKENS, attention_mask=mask)
        mask[0, :11] = 0
        mask[1, :3] = 0
        got = model(TOKENS, attention_mask=mask)
        assert torch.equal(got, model(TOKENS, attention_mask=PADDED.clone()))


def test_tables_are_rebuilt_for_another_dtype_or_mode(model):
    expected = model(TOKENS)
    with torch.inference_mode():
        assert torch.equal(model(TOKENS), expected)
    other = copy.deepcopy(model)
    other(TOKENS)
    other.to(torch.float64)
    other.cfg.dtype = torch.float64
    assert other(TOKENS).dtype == torch.float64
    x = other.W_E[TOKENS].detach().requires_grad_(True)  # after inference mode, with a gradient
    other(x, start_at_layer=0).sum().backward()
    assert bool(torch.isfinite(x.grad).all())


def test_gradients_equal_stock(model):
    def gradient():
        seen = {}

        def insert(h, hook):
            seen["x"] = h.detach().requires_grad_(True)
            return seen["x"]

        with model.hooks(fwd_hooks=[("hook_embed", insert)]):
            logits = model(TOKENS, attention_mask=PADDED)
        logits[PADDED.bool()].square().sum().backward()
        return seen["x"].grad

    got = gradient()
    with stock(model):
        expected = gradient()
    assert difference(got, expected) <= 1e-4 * float(expected.abs().max())


NAMES = ["hook_q", "hook_k", "hook_v", "hook_z", "hook_rot_q", "hook_attn_scores", "hook_pattern"]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", [*NAMES, "hook_rot_k"])
def test_hooks_get_stock_values_and_their_changes_take_effect(model, name, cached):
    def run(cache):
        seen, kept = [], []

        def change(x, hook):
            seen.append(x.clone())
            return 1.25 * x + torch.arange(x.shape[-1]).sin()  # -inf stays -inf

        at = f"blocks.1.attn.{name}"
        with model.hooks(fwd_hooks=[(at, change)]):
            for start, end in ((0, 20), (20, 21), (21, 30)) if cache else ((0, 30),):
                kept.append(
                    model(
                        TOKENS[:, start:end],
                        attention_mask=PADDED[:, start:end],
                        past_kv_cache=cache,
                    )
                )
        return seen, torch.cat(kept, 1)

    plain = model(TOKENS, attention_mask=PADDED)
    seen, got = run(KVCache.empty(model, 3) if cached else None)
    with stock(model):
        cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 3) if cached else None
        expected_seen, expected = run(cache)
    assert difference(got, expected, PADDED) <= 1e-4
    assert difference(got, plain, PADDED) > 1e-3
    assert len(seen) == len(expected_seen)
    spans = ((0, 20), (20, 21), (21, 30)) if cached else ((0, 30),)
    for a, b, span in zip(seen, expected_seen, spans, strict=True):
        if name == "hook_rot_k":
            b = b[:, -a.shape[1] :]  # the new positions
        assert a.shape == b.shape
        if name in ("hook_attn_scores", "hook_pattern"):
            a, b = a.transpose(1, 2), b.transpose(1, 2)  # query positions second, as elsewhere
        real = PADDED[:, slice(*span)].bool()
        assert torch.equal(a[real].isinf(), b[real].isinf())
        assert difference(a.nan_to_num(neginf=0), b.nan_to_num(neginf=0), real) <= 1e-4


def test_run_with_cache_has_every_activation_of_stock(model):
    logits, cache = model.run_with_cache(TOKENS, attention_mask=PADDED)
    with stock(model):
        expected_logits, expected = model.run_with_cache(TOKENS, attention_mask=PADDED)
    assert list(cache.keys()) == list(expected.keys())
    assert torch.equal(logits, expected_logits)
    for name in expected:
        assert torch.equal(cache[name], expected[name])


def test_without_hooks_no_scores_are_formed(model, monkeypatch):
    def refuse(*args):
        raise AssertionError("scores were formed")

    monkeypatch.setattr(FastAttention, "calculate_attention_scores", refuse)
    model(TOKENS)
    model(TOKENS[:, :1], past_kv_cache=KVCache.empty(model, 3))
    with (
        pytest.raises(AssertionError, match="formed"),
        model.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", lambda x, hook: x)]),
    ):
        model(TOKENS)


def test_hook_result_with_use_attn_result(model):
    plain = model(TOKENS)
    model.set_use_attn_result(True)
    try:
        seen = []
        with model.hooks(fwd_hooks=[("blocks.0.attn.hook_result", lambda x, hook: seen.append(x))]):
            got = model(TOKENS)
        assert seen[0].shape == (3, 30, model.cfg.n_heads, model.cfg.d_model)
        assert difference(got, plain) <= 1e-5
    finally:
        model.set_use_attn_result(False)


def test_transformer_lens_own_cache_and_generate_still_work(model):
    text = "hello"
    expected = model.generate(text, max_new_tokens=8, do_sample=False, verbose=False)
    with stock(model):
        assert model.generate(text, max_new_tokens=8, do_sample=False, verbose=False) == expected
