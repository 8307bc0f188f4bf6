"""A stack of adapters acts like the adapters one after the other."""

from dataclasses import replace

import pytest
import torch
from helpers import merged, random_adapter, tokens_of

from shl.config import LINEAR_SITES, SITE_KINDS
from shl.hooks.bake import baked, stack
from shl.hooks.handle import handles_on, suspended
from shl.utils.errors import ShlError

TOKENS = tokens_of(2, 20)


def four(model, sites):
    """Four rounds of adapters, each with its own scale (alpha / rank) and rank."""
    return [
        random_adapter(model, sites, (0, 2), seed=i, alpha=1.5 * (i + 1), rank=i + 1, size=0.12)
        for i in range(4)
    ]


def nested(model, adapters, tokens):
    """Each adapter's own hooks, attached in order."""
    handles = [adapter.attach(model) for adapter in adapters]
    try:
        return model(tokens)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("sites", [*((kind,) for kind in SITE_KINDS), SITE_KINDS])
def test_a_stack_of_four_equals_the_four_one_by_one(model, sites):
    adapters = four(model, sites)
    expected = nested(model, adapters, TOKENS)
    last = nested(model, adapters[3:], TOKENS)
    assert (expected - last).abs().max() > 0.05  # the first three count
    with baked(model, adapters):
        assert (model(TOKENS) - expected).abs().max() <= 1e-4


def test_a_stack_equals_all_of_them_merged_into_the_weights(model):
    adapters = four(model, LINEAR_SITES)
    expected = model
    for adapter in adapters:
        expected = merged(expected, adapter)
    with baked(model, adapters):
        assert (model(TOKENS) - expected(TOKENS)).abs().max() <= 1e-4


def test_residual_adapters_compose_in_order(gemma):
    # (1 + 2 * 3 * 5) = 31 and then (1 + 1 * 7 * 2) = 15 times the first feature; alone they add
    # only 30 + 14, so 1 + 44 = 45 would be wrong.
    unit = torch.zeros(1, 32)
    unit[0, 0] = 1.0
    first, second = (
        replace(
            random_adapter(gemma, ["resid"], (0,), rank=1),
            scale=scale,
            down={"blocks.0.resid": a * unit},
            up={"blocks.0.resid": b * unit.T},
        )
        for scale, a, b in ((2.0, 3.0, 5.0), (1.0, 7.0, 2.0))
    )
    both = stack([first, second])
    with both.attach(gemma):
        out = gemma.blocks[0].hook_resid_post(torch.ones(1, 1, 32))
    assert float(out[0, 0, 0]) == 31 * 15
    assert torch.equal(out[0, 0, 1:], torch.ones(31))


def test_order_matters_at_the_residual_site(gemma):
    one, two = (random_adapter(gemma, ["resid"], (1,), seed=i) for i in range(2))
    with baked(gemma, [one, two]):
        forward = gemma(TOKENS)
    with baked(gemma, [two, one]):
        assert (gemma(TOKENS) - forward).abs().max() > 0.01


def test_baking_nothing_is_base_to_the_bit(model):
    base = model(TOKENS)
    with baked(model, []) as handle:
        assert torch.equal(model(TOKENS), base)
        assert handle.stacked.sites == ()
        assert handles_on(model) == ()


def test_adapters_with_different_sites_stack(model):
    adapters = [
        random_adapter(model, ["q", "down", "resid"], (0, 1), seed=0),
        random_adapter(model, ["v", "down"], (1, 2), seed=1),
        random_adapter(model, ["resid", "gate"], (1,), seed=2),
    ]
    expected = nested(model, adapters, TOKENS)
    with baked(model, adapters) as handle:
        assert (model(TOKENS) - expected).abs().max() <= 1e-4
        ranks = {name: a.shape[0] for name, a in handle.stacked.down.items()}
    assert ranks["blocks.1.down"] == ranks["blocks.1.resid"] == 6
    assert ranks["blocks.0.q"] == ranks["blocks.2.v"] == 3


def test_one_matrix_pair_per_site_however_many_rounds(gemma):
    adapters = four(gemma, ["q"])
    with baked(gemma, adapters[:1]) as one:
        hooks = len(one._torch_handles)
    with baked(gemma, adapters) as all_of_them:
        assert len(all_of_them._torch_handles) == hooks
        # ranks 1 + 2 + 3 + 4
        assert all_of_them.stacked.down["blocks.0.q"].shape == (10, 32)


def test_base_is_one_context_away(model):
    base = model(TOKENS)
    with baked(model, four(model, SITE_KINDS)) as handle:
        with suspended(model):
            assert torch.equal(model(TOKENS), base)
        assert not torch.equal(model(TOKENS), base)
        handle.remove()
        assert torch.equal(model(TOKENS), base)


def test_a_stack_gives_no_gradient_to_the_adapters_it_was_made_of(gemma):
    adapter = random_adapter(gemma, ["q"], (0,))
    for parameter in adapter.parameters():
        parameter.requires_grad_(True)
    with baked(gemma, [adapter]):
        assert not gemma(TOKENS).requires_grad


def test_a_new_adapter_trains_on_top_of_a_stack(gemma):
    top = random_adapter(gemma, ["o"], (2,), seed=5)
    for parameter in top.parameters():
        parameter.requires_grad_(True)
    with baked(gemma, four(gemma, SITE_KINDS)), top.attach(gemma):
        gemma(TOKENS).square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in top.parameters())


def test_adapters_of_another_model_are_refused(gemma, llama):
    adapters = [random_adapter(gemma, ["q"], (0,)), random_adapter(llama, ["k"], (0,))]
    with pytest.raises(ShlError, match=r"different models: \['tiny-gemma', 'tiny-llama'\]"):
        stack(adapters)
    with pytest.raises(ShlError, match="at least one"):
        stack([])
    with pytest.raises(ShlError, match=r"blocks\.0\.q maps 32 to 64"):
        baked(llama, adapters[:1])
