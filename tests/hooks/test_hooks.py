"""Handles are removed however their body ends, beside TransformerLens's own hooks."""

import gc
import weakref

import pytest
import torch
from helpers import hook_count, random_adapter, tokens_of

from shl.config import SITE_KINDS
from shl.hooks.handle import handles_on, row_values, running, suspended
from shl.hooks.vector import SteeringVector
from shl.models.tiny import tiny_gemma
from shl.utils.errors import ShlError

TOKENS = tokens_of(2, 12)


@pytest.fixture
def adapter(model):
    return random_adapter(model, SITE_KINDS, (1,))


@pytest.fixture
def vector(model):
    directions = {1: torch.linspace(-1, 1, 32)}
    return SteeringVector(directions, model.cfg.model_name, "demo", 1)


@pytest.fixture
def base(model):
    return model(TOKENS)


def add_one(value, hook):
    return value + 1


def test_handles_are_listed_oldest_first_until_removed(model, adapter, vector):
    first, second = adapter.attach(model), vector.steering(model)
    assert handles_on(model) == (first, second)
    assert first.on
    first.remove()
    assert handles_on(model) == (second,)
    assert not first.on
    second.remove()
    second.remove()  # a second call does nothing
    assert handles_on(model) == ()


def test_entering_returns_the_handle_and_leaving_restores_the_model_exactly(model, adapter, base):
    handle = adapter.attach(model)
    with handle as entered:
        assert entered is handle
        assert not torch.equal(model(TOKENS), base)
    assert not handle.on
    assert torch.equal(model(TOKENS), base)


def test_no_hook_is_left_when_nested_bodies_raise(model, adapter, vector, base):
    with (
        pytest.raises(RuntimeError, match="body"),
        model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", add_one)]),
        adapter.attach(model),
        vector.steering(model),
        suspended(model),
    ):
        raise RuntimeError("body" if hook_count(model) > 0 else "no hook was on")
    assert handles_on(model) == ()
    assert hook_count(model) == 0
    assert torch.equal(model(TOKENS), base)


def test_an_adapter_works_again_after_a_forward_that_raised(model, adapter, base):
    def fail(value, hook):
        raise RuntimeError("forward")

    # It fails between the hook that reads q's input and the one that adds the update.
    with adapter.attach(model):
        expected = model(TOKENS)
        with pytest.raises(RuntimeError, match="forward"):
            model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.attn.hook_k", fail)])
        assert torch.equal(model(TOKENS), expected)
    assert hook_count(model) == 0
    assert torch.equal(model(TOKENS), base)


def test_reset_hooks_does_not_remove_handles(model, adapter, vector):
    with adapter.attach(model), vector.steering(model):
        before = model(TOKENS)
        model.reset_hooks(including_permanent=True)
        assert torch.equal(model(TOKENS), before)
        with model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", add_one)]):
            assert not torch.equal(model(TOKENS), before)
        assert torch.equal(model(TOKENS), before)


def test_suspending_gives_base_to_the_bit_and_restores(model, adapter, vector, base):
    with adapter.attach(model), vector.steering(model):
        on = model(TOKENS)
        with suspended(model):
            assert handles_on(model) == ()
            assert torch.equal(model(TOKENS), base)
            with suspended(model):
                assert torch.equal(model(TOKENS), base)
            assert torch.equal(model(TOKENS), base)
        assert torch.equal(model(TOKENS), on)


def test_suspending_one_handle_leaves_the_others(model, adapter, vector):
    with vector.steering(model):
        steered = model(TOKENS)
    with (
        adapter.attach(model) as handle,
        vector.steering(model) as steering,
        suspended(model, handle),
    ):
        assert handles_on(model) == (steering,)
        assert torch.equal(model(TOKENS), steered)


def test_suspending_ends_when_its_body_raises(model, adapter, base):
    with adapter.attach(model) as handle:
        with pytest.raises(RuntimeError), suspended(model):
            raise RuntimeError
        assert handle.on
        assert not torch.equal(model(TOKENS), base)


def test_suspended_keeps_the_callers_own_hooks(model, adapter):
    own = [("blocks.0.hook_resid_post", add_one)]
    expected = model.run_with_hooks(TOKENS, fwd_hooks=own)
    with adapter.attach(model), model.hooks(fwd_hooks=own), suspended(model):
        assert torch.equal(model(TOKENS), expected)


def test_run_with_cache_and_run_with_hooks_include_the_changes(model, adapter, vector):
    with adapter.attach(model), vector.steering(model):
        plain = model(TOKENS)
        logits, cache = model.run_with_cache(TOKENS)
        # Scores are formed only where they are cached: the same sums in another order.
        assert (logits - plain).abs().max() <= 1e-5
        seen = {}
        name = "blocks.1.hook_resid_post"
        model.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda h, hook: seen.update(h=h))])
        assert (seen["h"] - cache[name]).abs().max() <= 1e-5
        assert torch.equal(cache[name], cache["blocks.2.hook_resid_pre"])


def test_a_model_is_freed_once_its_handles_are_removed():
    model = tiny_gemma(n_layers=1)
    random_adapter(model).attach(model).remove()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.hooked
def test_adapter_reads_positional_and_keyword_inputs(gemma):
    x = torch.ones(1, 1, 32)
    with random_adapter(gemma, ["up"], (0,)).attach(gemma):
        assert torch.equal(gemma.blocks[0].mlp(x), gemma.blocks[0].mlp(x=x))


def test_row_values_are_those_of_the_batch_rows():
    values = torch.tensor([1.0, 2.0, 3.0])
    assert row_values(values, 3) is values
    with pytest.raises(ShlError, match="3 per-row doses were given for a batch of 2"):
        row_values(values, 2)
    with running(rows=[2, 0]):
        assert row_values(values, 2).tolist() == [3.0, 1.0]
        with pytest.raises(ShlError, match="2 per-row doses were given for at least 3 rows"):
            row_values(values[:2], 2)
