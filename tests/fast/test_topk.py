"""Top logits by the shortlist equal those of the full product, also where the bound fails."""

from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shl.fast.topk import Rough, shortlist_applies, top_logits
from shl.models.generate import generate
from shl.models.tiny import tiny_gemma

topk = import_module("shl.fast.topk")
D, V = 16, 3000


def random(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def assert_is_the_top(hidden, unembed, k, bias=None):
    values, tokens = top_logits(hidden, unembed, k, bias=bias)
    logits = hidden @ unembed + (0 if bias is None else bias)
    expected = logits.topk(k)
    assert (values - expected.values).abs().max() <= 1e-5 * logits.abs().max()
    # The tokens' own logits, so that ties may fall either way.
    assert (logits.gather(1, tokens) - expected.values).abs().max() <= 1e-5 * logits.abs().max()
    assert all(len(set(row)) == k for row in tokens.tolist())


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 4), st.floats(0.01, 100))
def test_equals_the_full_product(seed, k, batch, scale):
    hidden = random(batch, D, seed=seed + 1, scale=scale)
    assert_is_the_top(hidden, random(D, V, seed=seed), k)


def test_bias_is_added():
    hidden, unembed, bias = random(3, D, seed=1), random(D, V), random(V, seed=2, scale=3.0)
    assert_is_the_top(hidden, unembed, 8, bias)
    with_it = top_logits(hidden, unembed, 8, bias=bias)[1]
    assert not torch.equal(with_it, top_logits(hidden, unembed, 8)[1])


def counted(monkeypatch):
    rows = []
    real = topk.full_top_logits

    def full(h, *rest, **options):
        rows.append(len(h))
        return real(h, *rest, **options)

    monkeypatch.setattr(topk, "full_top_logits", full)
    return rows


def test_only_unproven_rows_use_the_full_product(monkeypatch):
    rows = counted(monkeypatch)
    # One token is far above the rest for the first row; for the second all are nearly equal.
    weight = random(D, V, scale=1e-4)
    weight[0, 7] = 50.0
    hidden = torch.zeros(2, D)
    hidden[0, 0], hidden[1, 1] = 1.0, 1.0
    values, tokens = top_logits(hidden, weight, 1)
    assert rows == [1]
    assert (float(values[0, 0]), int(tokens[0, 0])) == (50.0, 7)
    assert int(tokens[1, 0]) == int((hidden @ weight)[1].argmax())


@pytest.mark.parametrize("batch", [1, 2])
def test_tokens_with_equal_16_bit_logits_are_distinguished(batch):
    # 1 + 2^-12 rounds to 1 in bf16 (8 bits) and fp16 (11); the best token is one of 3000 such.
    weight = torch.ones(1, V)
    weight[0, 1234] = 1 + 2**-12
    assert top_logits(torch.ones(batch, 1), weight, 1)[1].tolist() == [[1234]] * batch
    # Every factor fits 16 bits, but the logits 4096 + 0.5 and 4096 + 0.9375 both round to 4096.
    weight = torch.tensor([[1.0], [0.5]]).repeat(1, V)
    weight[1, 1234] = 0.9375
    hidden = torch.tensor([[4096.0, 1.0]] * batch)
    assert top_logits(hidden, weight, 1)[1].tolist() == [[1234]] * batch


def test_small_vocabulary_uses_the_full_product(monkeypatch):
    rows = counted(monkeypatch)
    assert_is_the_top(random(2, D), random(D, 64), 1)
    assert rows == [2]


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 10**6), st.floats(-3, 3), st.sampled_from([topk.ONE_ROW, topk.ROWS]))
def test_bound_covers_the_error_of_16_bit_logits(seed, log_scale, dtype):
    weight = random(V, D, seed=seed)
    hidden = random(1 if dtype == topk.ONE_ROW else 4, D, seed=seed + 1, scale=10**log_scale)
    rough = Rough.of(weight, dtype)
    logits = torch.nn.functional.linear(hidden.to(dtype), rough.weight).double()
    off = (logits - hidden.double() @ weight.double().T).abs()
    bound = rough.bound(hidden, logits.abs().amax(1).float())
    assert bool((off.amax(1) <= bound).all())
    # The bound is at most 100 times the largest error, plus the smallest normal number.
    assert bool((bound <= 100 * off.amax(1) + torch.finfo(dtype).smallest_normal).all())


def test_16_bit_products_accumulate_in_fp32():
    # 4096 and 640 ones: fp16 has steps of 4 up there, so a sum in fp16 would stay where it began.
    hidden, weight = torch.ones(1, 641), torch.ones(V, 641)
    weight[:, 0] = 4096.0
    rough = Rough.of(weight, topk.ONE_ROW)
    logits = torch.nn.functional.linear(hidden.half(), rough.weight)
    assert set(logits[0].tolist()) == {4736.0}  # 4096 + 640


def test_bound_grows_with_the_logit():
    # r + |r| 2^-8 grows with r, so the bound of the last listed token holds for all others.
    rough = Rough.of(random(V, D), topk.ROWS)
    r = torch.linspace(-300, 300, 4001)
    ceilings = r + rough.bound(torch.ones(len(r), D), r)
    assert bool((ceilings.diff() > 0).all())


def test_values_beyond_fp16_use_the_full_product(monkeypatch):
    rows = counted(monkeypatch)
    weight = random(D, V)
    for hidden in (random(1, D, seed=1) * 1e5, random(1, D, seed=1) * 3e4):
        # 65,504 is the largest number of fp16: the hidden state does not fit, or its logits.
        assert_is_the_top(hidden, weight, 4)
    assert rows == [1, 1]
    assert_is_the_top(random(1, D, seed=1), weight * 1e5, 4)
    assert rows == [1, 1, 1]


def test_one_row_and_several_use_separate_copies():
    unembed = random(D, V)
    for batch in (1, 3, 1):
        assert_is_the_top(random(batch, D, seed=batch), unembed, 2)
    copies = topk._ROUGH[unembed]
    assert {dtype: rough.weight.dtype for dtype, rough in copies.items()} == {
        torch.float16: torch.float16,
        torch.bfloat16: torch.bfloat16,
    }


def test_changed_weights_are_copied_again():
    hidden, unembed = random(1, D, seed=1), random(D, V)
    top_logits(hidden, unembed, 1)
    unembed[:, 5] = 100 * hidden[0]
    assert top_logits(hidden, unembed, 1)[1].tolist() == [[5]]


def test_nan_in_hidden_state_gives_nan_logits():
    hidden = random(2, D)
    hidden[0, 0] = torch.nan
    values, _ = top_logits(hidden, random(D, V), 1)
    assert not bool(torch.isfinite(values[0]).all())


@pytest.mark.parametrize("name", ["unembed", "unembed.hook_in", "unembed.hook_out"])
def test_shortlist_does_not_apply_with_hooks_on_logits(gemma, name, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert shortlist_applies(gemma)
    handle = gemma.get_submodule(name).register_forward_hook(lambda *_: None)
    assert not shortlist_applies(gemma)
    handle.remove()


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_k": 5, "seed": 3}])
def test_generate_is_the_same_with_and_without_shortlist(monkeypatch, settings):
    model = tiny_gemma()
    prompts = ["Hello?", "And you?", "z"]
    monkeypatch.setattr(topk, "WIDEN", 2)
    monkeypatch.setattr(topk, "max", lambda _, n: n, raising=False)
    texts = []
    for fast in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        rows = counted(monkeypatch)
        texts.append(generate(model, prompts, max_new_tokens=12, min_new_tokens=4, **settings))
        assert (sum(rows) < 36) if fast else rows == []
    assert texts[0] == texts[1]


def test_bound_covers_each_error_alone():
    """Errors of 2^-9 by hand, which bf16 rounds away, and an approximate logit of 0."""
    large, odd = 64.0, 1 + 2**-9
    # The hidden state is rounded: (1, 1) . (64, -64) = 0, exactly 64 * 2^-9.
    rough = Rough.of(torch.tensor([[large, -large]]), topk.ROWS)
    assert rough.largest_error == 0
    assert float(rough.bound(torch.tensor([[odd, 1.0]]), torch.zeros(1))) >= large * 2**-9
    # The row is rounded: likewise.
    rough = Rough.of(torch.tensor([[large * odd, -large]]), topk.ROWS)
    bound = float(rough.bound(torch.tensor([[1.0, 1.0]]), torch.zeros(1)))
    # Cauchy and Schwarz: the norm of the hidden state times that of the row's error.
    assert bound >= 2**0.5 * large * 2**-9


def test_list_is_proven_by_the_last_listed_logit(monkeypatch):
    # All logits are equal, so those off the list may be as large as those on it.
    rows = counted(monkeypatch)
    top_logits(torch.ones(1, D), torch.ones(D, V), 1)
    assert rows == [1]


@pytest.mark.parametrize(("n", "k"), [(4096, 5), (4096, 31), (4096, 32), (4097, 5), (100, 100)])
def test_largest_is_topk(n, k):
    x = random(3, n, seed=n + k)
    x[1, :k] += 9  # all in one block
    x[2, -1] = torch.inf
    values, places = topk.largest(x, k)
    expected = x.topk(k)
    assert torch.equal(values, expected.values)
    assert torch.equal(places, expected.indices)


@pytest.mark.parametrize("bias", [None, 3.0])
@pytest.mark.parametrize("rows", [1, 5, 200])
def test_full_top_logits_over_parts_are_those_of_the_whole_product(rows, bias):
    # 8192 x 32 splits into 8 parts for 5 rows, and for one with two threads.
    hidden, weight = random(rows, 32, seed=1), random(32, 8192, seed=2).T.contiguous().T
    added = None if bias is None else bias * random(1, 8192, seed=3)[0]
    logits = hidden.double() @ weight.double() + (0 if added is None else added.double())
    values, tokens = topk.full_top_logits(hidden, weight, 40, bias=added)
    expected = logits.topk(40)
    assert torch.allclose(values.double(), expected.values, atol=1e-4)
    assert torch.allclose(logits.gather(1, tokens), expected.values, atol=1e-4)
    parts = topk.linear_in_parts(hidden, weight.T)
    assert parts.shape == ((5, 8, 1024) if rows == 5 else parts.shape)
    assert torch.allclose(parts.flatten(1), hidden @ weight, atol=1e-4)
