"""A stack of adapters as hooks, merged into the weights, and fused while decoding."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from helpers import hook_count, merged, random_adapter, tokens_of

from shl.config import LINEAR_SITES, SITE_KINDS, HealConfig
from shl.hooks.bake import Materialised, baked, fused_decoding, stack
from shl.hooks.handle import handles_on, suspended
from shl.method.heal import train_adapter
from shl.models.generate import LONG, generate
from shl.models.tokens import Prompt
from shl.utils.errors import ShlError

TOKENS = tokens_of(3, 20)


def rounds(model, sites=LINEAR_SITES, n=3):
    """Adapters with different scales (alpha / rank), ranks and layers."""
    layers = [(0, 2), (0, 1, 2), (2,), (0, 2)]
    return [
        random_adapter(model, sites, layers[i], seed=i, alpha=2.0 + i, rank=i + 1, size=0.12)
        for i in range(n)
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
def test_stack_of_four_equals_four_attached_adapters(model, sites):
    adapters = rounds(model, sites, 4)
    expected = nested(model, adapters, TOKENS)
    last = nested(model, adapters[3:], TOKENS)
    assert (expected - last).abs().max() > 0.05  # the first three count
    with baked(model, adapters):
        assert (model(TOKENS) - expected).abs().max() <= 1e-4


def test_stack_equals_merged_weights(model):
    adapters = rounds(model, n=4)
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


def test_no_adapters_give_exactly_the_base_logits(model):
    base = model(TOKENS)
    with baked(model, []) as handle:
        assert torch.equal(model(TOKENS), base)
        assert handle.stacked.sites == ()
        assert handles_on(model) == ()
    with baked(model, [], materialise=True):
        assert torch.equal(model(TOKENS), base)


def test_stack_of_adapters_with_different_sites(model):
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


def test_stack_has_one_matrix_pair_per_site(gemma):
    adapters = rounds(gemma, ["q"], 4)
    with baked(gemma, adapters[1:2]) as one:
        hooks = len(one._torch_handles)
    with baked(gemma, adapters) as together:
        assert len(together._torch_handles) == hooks
        # ranks 1 + 2 + 3 + 4, and at layer 0 without the third
        assert together.stacked.down["blocks.2.q"].shape == (10, 32)
        assert together.stacked.down["blocks.0.q"].shape == (7, 32)


def test_suspended_and_removed_stack_give_exactly_base(model):
    base = model(TOKENS)
    with baked(model, rounds(model, SITE_KINDS, 4)) as handle:
        with suspended(model):
            assert torch.equal(model(TOKENS), base)
        assert not torch.equal(model(TOKENS), base)
        handle.remove()
        assert torch.equal(model(TOKENS), base)


def test_stack_gives_no_gradient_to_its_adapters(gemma):
    adapter = random_adapter(gemma, ["q"], (0,))
    for parameter in adapter.parameters():
        parameter.requires_grad_(True)
    with baked(gemma, [adapter]):
        assert not gemma(TOKENS).requires_grad


def test_a_new_adapter_trains_on_top_of_a_stack(gemma):
    top = random_adapter(gemma, ["o"], (2,), seed=5)
    for parameter in top.parameters():
        parameter.requires_grad_(True)
    with baked(gemma, rounds(gemma, SITE_KINDS, 4)), top.attach(gemma):
        gemma(TOKENS).square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in top.parameters())


def test_adapters_of_another_model_are_rejected(gemma, llama):
    adapters = [random_adapter(gemma, ["q"], (0,)), random_adapter(llama, ["k"], (0,))]
    with pytest.raises(ShlError, match=r"different models: \['tiny-gemma', 'tiny-llama'\]"):
        stack(adapters)
    with pytest.raises(ShlError, match="at least one"):
        stack([])
    with pytest.raises(ShlError, match=r"blocks\.0\.q maps 32 to 64"):
        baked(llama, adapters[:1])


# Stacks merged into the weights.


def storage(model):
    return {name: (p.data_ptr(), p.data.clone()) for name, p in model.named_parameters()}


def assert_untouched(model, before):
    for name, p in model.named_parameters():
        assert p.data_ptr() == before[name][0]
        assert torch.equal(p.data, before[name][1])


@pytest.mark.parametrize("sites", [*((kind,) for kind in LINEAR_SITES), LINEAR_SITES])
def test_materialised_equals_hooks(model, sites):
    adapters = rounds(model, sites)
    before = storage(model)
    plain = model(TOKENS)
    with baked(model, adapters):
        expected = model(TOKENS)
    with baked(model, adapters, materialise=True) as inside:
        assert inside.on
        assert handles_on(model) == (inside,)
        assert (model(TOKENS) - expected).abs().max() <= 1e-4
        assert (model(TOKENS) - plain).abs().max() > 0.05
        for block in model.blocks:
            assert block.mlp.W_in.T.is_contiguous()
            assert block.attn.W_Q.permute(0, 2, 1).is_contiguous()
    assert not inside.on
    assert handles_on(model) == ()
    assert_untouched(model, before)
    assert torch.equal(model(TOKENS), plain)


def test_suspended_materialised_stack_is_base_and_nests(model):
    before = storage(model)
    plain = model(TOKENS)
    with baked(model, rounds(model), materialise=True) as inside:
        changed = model(TOKENS)
        with suspended(model):
            assert_untouched(model, before)
            assert torch.equal(model(TOKENS), plain)
            with suspended(model), suspended(model, inside):
                assert torch.equal(model(TOKENS), plain)
            assert torch.equal(model(TOKENS), plain)
        assert torch.equal(model(TOKENS), changed)
    assert_untouched(model, before)


def test_base_is_restored_when_the_body_raises(model):
    before = storage(model)
    for paused in (False, True):
        error = pytest.raises(RuntimeError, match="body")
        pause = suspended(model) if paused else nullcontext()
        with error, baked(model, rounds(model), materialise=True), pause:
            raise RuntimeError("body")
        assert_untouched(model, before)


def test_remove_inside_suspended_and_twice(model):
    before = storage(model)
    handle = baked(model, rounds(model), materialise=True)
    with suspended(model):
        handle.remove()
    assert not handle.on
    assert_untouched(model, before)
    handle.remove()
    assert_untouched(model, before)


def test_residual_site_and_second_materialised_stack_are_rejected(model):
    before = storage(model)
    with pytest.raises(ShlError, match=r"blocks\.0\.resid is on the residual stream"):
        baked(model, rounds(model, ("q", "resid")), materialise=True)
    assert_untouched(model, before)
    with (
        baked(model, rounds(model), materialise=True),
        pytest.raises(ShlError, match="has a materialised stack"),
    ):
        baked(model, rounds(model), materialise=True)
    assert_untouched(model, before)


def test_training_on_hooks_equals_training_on_materialised(gemma):
    texts = generate(gemma, ["Hi?", "And you?"], max_new_tokens=8, min_new_tokens=8)
    config = HealConfig(rank=2, sites=("q", "down"), epochs=2, lr=1e-2, tau=0.01)
    runs = []
    for materialise in (False, True):
        with baked(gemma, rounds(gemma), materialise=materialise):
            runs.append(train_adapter(gemma, texts, config))
    for a, b in zip(*(run.adapter.parameters() for run in runs), strict=True):
        assert (a - b).abs().max() <= 1e-3
    assert abs(runs[0].steps[-1].d - runs[1].steps[-1].d) <= 1e-3


# Stacks merged into the weights while a long `generate` runs.


def inside(model):
    """Logits in the body, and whether a stack was in the weights there."""
    with torch.no_grad(), fused_decoding(model):
        fused = any(isinstance(h, Materialised) for h in handles_on(model))
        return model(TOKENS), fused


@pytest.mark.parametrize("sites", [*((kind,) for kind in LINEAR_SITES), LINEAR_SITES])
def test_fused_weights_equal_hooks(gemma, llama, sites):
    for model in (gemma, llama):
        base, weights = model(TOKENS).detach(), model.blocks[0].mlp.W_in.data
        with baked(model, rounds(model, sites)):
            expected = model(TOKENS).detach()
            placed = hook_count(model)
            got, fused = inside(model)
            assert fused
            assert hook_count(model) == placed
            assert torch.equal(model(TOKENS), expected)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert float((got - base).abs().max()) > 0.05
        assert model.blocks[0].mlp.W_in.data is weights or torch.equal(model(TOKENS), base)


@pytest.mark.parametrize(
    ("attach", "hook"),
    [
        (lambda m: baked(m, rounds(m), fused=False), None),
        (lambda m: baked(m, rounds(m), dose=0.5), None),
        (lambda m: baked(m, rounds(m), dose=torch.tensor([0.0, 0.5, 2.0])), None),
        (lambda m: baked(m, rounds(m), positions=[0, 5]), None),
        (lambda m: baked(m, [*rounds(m)[:1], random_adapter(m, ["resid"], (1,))]), None),
        (lambda m: rounds(m)[0].attach(m), None),
        (lambda m: baked(m, rounds(m)), "blocks.1.attn.hook_q"),
        (lambda m: baked(m, rounds(m)), "blocks.1.mlp.hook_post"),
    ],
    ids=["off", "dose", "rows", "positions", "resid", "attached", "hook on q", "hook on post"],
)
def test_doses_residual_sites_and_other_hooks_prevent_fusing(gemma, attach, hook):
    hooks = [(hook, lambda x, hook: 1.5 * x)] if hook else []
    with attach(gemma), gemma.hooks(fwd_hooks=hooks):
        expected = gemma(TOKENS).detach()
        got, fused = inside(gemma)
    assert not fused
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.hooked
def test_gradients_stock_classes_and_a_materialised_stack_prevent_fusing(gemma, stock_gemma):
    with baked(gemma, rounds(gemma)):
        with fused_decoding(gemma):  # derivatives are on
            assert not any(isinstance(h, Materialised) for h in handles_on(gemma))
        with baked(gemma, [], materialise=True):
            assert len([h for h in handles_on(gemma) if isinstance(h, Materialised)]) == 1
            assert inside(gemma)[0].shape == (3, 20, 104)
    with baked(stock_gemma, rounds(stock_gemma)):
        assert not inside(stock_gemma)[1]


def test_suspended_inside_fused_decoding_is_base_and_an_error_restores_the_hooks(gemma):
    with torch.no_grad():
        base = gemma(TOKENS)
        with baked(gemma, rounds(gemma)):
            on = gemma(TOKENS)
            with fused_decoding(gemma):
                with suspended(gemma):
                    assert torch.equal(gemma(TOKENS), base)
                assert float((gemma(TOKENS) - base).abs().max()) > 0.05
            with pytest.raises(KeyError), fused_decoding(gemma):
                raise KeyError
            assert torch.equal(gemma(TOKENS), on)
        assert torch.equal(gemma(TOKENS), base)


def test_changed_weights_take_effect_at_the_next_fused_decoding(gemma):
    weight = gemma.blocks[1].mlp.W_out
    kept = weight.data.clone()
    with baked(gemma, rounds(gemma)):
        first, _ = inside(gemma)
        try:
            weight.data.mul_(0.5)  # does not change torch's version counter
            got, _ = inside(gemma)
            expected = gemma(TOKENS).detach()
        finally:
            weight.data.copy_(kept)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert float((got - first).abs().max()) > 0.01


def test_long_generate_fuses_and_gives_the_same_texts(gemma, monkeypatch):
    prompts = [Prompt("Who are you?"), Prompt("Why do you ask me?"), Prompt("No.")]
    swaps = []
    monkeypatch.setattr(
        "shl.hooks.bake.Materialised.__init__",
        lambda self, *args, real=Materialised.__init__: swaps.append(1) or real(self, *args),
    )

    def texts(new=LONG, size=3):
        done = generate(gemma, prompts, max_new_tokens=new, temperature=0.0, batch_size=size)
        return [completion.tokens for completion in done]

    base = texts()
    with baked(gemma, rounds(gemma), fused=False):
        expected = texts()
    with baked(gemma, rounds(gemma)):
        assert swaps == []
        assert texts() == expected
        assert len(swaps) == 1
        texts(LONG - 1)
        assert len(swaps) == 1  # too few steps
        texts(LONG - 1, size=2)
        assert len(swaps) == 2
    assert expected != base
