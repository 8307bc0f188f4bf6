"""A materialised stack equals the hooks, and base's own tensors come back by reference."""

import pytest
import torch
from helpers import random_adapter, tokens_of

from shl.config import LINEAR_SITES
from shl.hooks.bake import baked
from shl.hooks.handle import handles_on, suspended
from shl.method.heal import train_adapter
from shl.utils.errors import ShlError

TOKENS = tokens_of(2, 20)


def three(model, sites=LINEAR_SITES):
    return [
        random_adapter(model, sites, (0, 2), seed=i, alpha=1.5 * (i + 1), rank=i + 1, size=0.12)
        for i in range(3)
    ]


def storage(model):
    return {name: (p.data_ptr(), p.data.clone()) for name, p in model.named_parameters()}


def assert_untouched(model, before):
    for name, p in model.named_parameters():
        assert p.data_ptr() == before[name][0]
        assert torch.equal(p.data, before[name][1])


@pytest.mark.parametrize("sites", [*((kind,) for kind in LINEAR_SITES), LINEAR_SITES])
def test_equals_the_hooks(model, sites):
    adapters = three(model, sites)
    before = storage(model)
    plain = model(TOKENS)
    with baked(model, adapters):
        expected = model(TOKENS)
    with baked(model, adapters, materialise=True) as inside:
        assert inside.on
        assert handles_on(model) == (inside,)
        assert (model(TOKENS) - expected).abs().max() <= 1e-4
        assert (model(TOKENS) - plain).abs().max() > 0.05
    assert not inside.on
    assert handles_on(model) == ()
    assert_untouched(model, before)
    assert torch.equal(model(TOKENS), plain)


def test_the_layout_stays_free_of_copies(model):
    with baked(model, three(model), materialise=True):
        for block in model.blocks:
            assert block.mlp.W_in.T.is_contiguous()
            assert block.attn.W_Q.permute(0, 2, 1).is_contiguous()


def test_suspended_is_base_and_nests(model):
    before = storage(model)
    plain = model(TOKENS)
    with baked(model, three(model), materialise=True) as inside:
        changed = model(TOKENS)
        with suspended(model):
            assert_untouched(model, before)
            assert torch.equal(model(TOKENS), plain)
            with suspended(model), suspended(model, inside):
                assert torch.equal(model(TOKENS), plain)
            assert torch.equal(model(TOKENS), plain)
        assert torch.equal(model(TOKENS), changed)
    assert_untouched(model, before)


def test_base_comes_back_when_the_body_raises(model):
    before = storage(model)
    inside = pytest.raises(RuntimeError, match="body")
    with inside, baked(model, three(model), materialise=True):
        raise RuntimeError("body")
    assert_untouched(model, before)
    inside = pytest.raises(RuntimeError, match="body")
    with inside, baked(model, three(model), materialise=True), suspended(model):
        raise RuntimeError("body")
    assert_untouched(model, before)


def test_a_handle_is_removed_once_even_inside_suspended(model):
    before = storage(model)
    handle = baked(model, three(model), materialise=True)
    with suspended(model):
        handle.remove()
    assert not handle.on
    assert_untouched(model, before)
    handle.remove()
    assert_untouched(model, before)


def test_the_residual_site_and_a_second_stack_are_refused(model):
    before = storage(model)
    with pytest.raises(ShlError, match=r"blocks\.0\.resid is on the residual stream"):
        baked(model, three(model, ("q", "resid")), materialise=True)
    assert_untouched(model, before)
    with (
        baked(model, three(model), materialise=True),
        pytest.raises(ShlError, match="has a materialised stack"),
    ):
        baked(model, three(model), materialise=True)
    assert_untouched(model, before)


def test_no_adapter_is_base_itself(model):
    plain = model(TOKENS)
    with baked(model, [], materialise=True):
        assert torch.equal(model(TOKENS), plain)


def test_training_on_top_is_the_same_either_way(gemma):
    from shl.config import HealConfig
    from shl.models.generate import generate

    texts = generate(gemma, ["Hi?", "And you?"], max_new_tokens=8, min_new_tokens=8)
    config = HealConfig(rank=2, sites=("q", "down"), epochs=2, lr=1e-2, tau=0.01)
    runs = []
    for materialise in (False, True):
        with baked(gemma, three(gemma), materialise=materialise):
            runs.append(train_adapter(gemma, texts, config))
    for a, b in zip(*(run.adapter.parameters() for run in runs), strict=True):
        assert (a - b).abs().max() <= 1e-3
    assert abs(runs[0].steps[-1].d - runs[1].steps[-1].d) <= 1e-3
