"""In a long generate, baked stacks in the weights equal their hooks."""

import pytest
import torch
from helpers import hook_count, random_adapter, tokens_of

from shl.config import LINEAR_SITES
from shl.hooks.bake import Materialised, baked, fused_decoding
from shl.hooks.handle import handles_on, suspended
from shl.models.generate import LONG, generate
from shl.models.tokens import Prompt

TOKENS = tokens_of(3, 9)


def three(model, sites=LINEAR_SITES):
    """Rounds of different rank, scale and layers."""
    layers = [(0, 1, 2), (0, 2), (1,)]
    return [
        random_adapter(model, sites, layers[i], seed=i, alpha=2.0 + i, rank=2 * i + 1, size=0.12)
        for i in range(3)
    ]


def inside(model):
    """Logits in the body, and whether a stack was in the weights there."""
    with torch.no_grad(), fused_decoding(model):
        fused = any(isinstance(h, Materialised) for h in handles_on(model))
        return model(TOKENS), fused


@pytest.mark.parametrize("sites", [*((kind,) for kind in LINEAR_SITES), LINEAR_SITES])
def test_the_weights_give_what_the_hooks_give(gemma, llama, sites):
    for model in (gemma, llama):
        base, weights = model(TOKENS).detach(), model.blocks[0].mlp.W_in.data
        with baked(model, three(model, sites)):
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
        (lambda m: baked(m, three(m), fused=False), None),
        (lambda m: baked(m, three(m), dose=0.5), None),
        (lambda m: baked(m, three(m), dose=torch.tensor([0.0, 0.5, 2.0])), None),
        (lambda m: baked(m, three(m), positions=[0, 5]), None),
        (lambda m: baked(m, [*three(m)[:1], random_adapter(m, ["resid"], (1,))]), None),
        (lambda m: three(m)[0].attach(m), None),
        (lambda m: baked(m, three(m)), "blocks.1.attn.hook_q"),
        (lambda m: baked(m, three(m)), "blocks.1.mlp.hook_post"),
    ],
    ids=["off", "dose", "rows", "positions", "resid", "attached", "watched q", "watched post"],
)
def test_what_weights_cannot_express_or_others_watch_keeps_its_hooks(gemma, attach, hook):
    hooks = [(hook, lambda x, hook: 1.5 * x)] if hook else []
    with attach(gemma), gemma.hooks(fwd_hooks=hooks):
        expected = gemma(TOKENS).detach()
        got, fused = inside(gemma)
    assert not fused
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_derivatives_stock_classes_and_a_second_stack_keep_the_hooks(gemma, stock_gemma):
    with baked(gemma, three(gemma)):
        with fused_decoding(gemma):  # derivatives are on
            assert not any(isinstance(h, Materialised) for h in handles_on(gemma))
        with baked(gemma, [], materialise=True):
            assert len([h for h in handles_on(gemma) if isinstance(h, Materialised)]) == 1
            assert inside(gemma)[0].shape == (3, 9, 104)
    with baked(stock_gemma, three(stock_gemma)):
        assert not inside(stock_gemma)[1]


def test_suspended_is_base_inside_and_an_error_leaves_nothing_behind(gemma):
    with torch.no_grad():
        base = gemma(TOKENS)
        with baked(gemma, three(gemma)):
            on = gemma(TOKENS)
            with fused_decoding(gemma):
                with suspended(gemma):
                    assert torch.equal(gemma(TOKENS), base)
                assert float((gemma(TOKENS) - base).abs().max()) > 0.05
            with pytest.raises(KeyError), fused_decoding(gemma):
                raise KeyError
            assert torch.equal(gemma(TOKENS), on)
        assert torch.equal(gemma(TOKENS), base)


def test_an_edit_of_the_weights_counts_from_the_next_body_on(gemma):
    weight = gemma.blocks[1].mlp.W_out
    kept = weight.data.clone()
    with baked(gemma, three(gemma)):
        first, _ = inside(gemma)
        try:
            weight.data.mul_(0.5)  # which torch's version counter does not see
            got, _ = inside(gemma)
            expected = gemma(TOKENS).detach()
        finally:
            weight.data.copy_(kept)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert float((got - first).abs().max()) > 0.01


def test_generation_takes_that_way_to_the_same_texts(gemma, monkeypatch):
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
    with baked(gemma, three(gemma), fused=False):
        expected = texts()
    with baked(gemma, three(gemma)):
        assert swaps == []
        assert texts() == expected
        assert len(swaps) == 1
        texts(LONG - 1)
        assert len(swaps) == 1  # too few steps
        texts(LONG - 1, size=2)
        assert len(swaps) == 2
    assert expected != base
