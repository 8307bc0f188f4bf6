"""Training compared with full logits in float64: loss, barrier, log."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from helpers import hook_count, kl_by_hand, log_p_by_hand, nll_by_hand, one_sentence, random_adapter

from shl.config import HealConfig
from shl.hooks.adapter import fresh_adapter
from shl.hooks.bake import baked
from shl.method.heal import heal, train_adapter
from shl.models.generate import Completion, generate
from shl.models.scores import token_divergence
from shl.models.tokens import Prompt
from shl.utils.errors import ShlError

PLAIN = HealConfig(rank=4, epochs=6, lr=2e-2, batch_size=3, divergence="none")
HELD = replace(PLAIN, divergence="kl_rev", tau=0.1, lam=3.0)
PROMPTS = ["Tell me about your long and quiet day?", "Hi?", "Why is that so?", "A b?", "What now?"]


@pytest.fixture
def texts(gemma):
    return generate(gemma, PROMPTS, max_new_tokens=16, min_new_tokens=5, seed=2)


def rmse(kl):
    return float(kl.square().mean().sqrt())


def d_by_hand(model, adapters, texts):
    """Mean rmse divergence from base."""
    base = [log_p_by_hand(model, c) for c in texts]
    with baked(model, adapters):
        student = [log_p_by_hand(model, c) for c in texts]
    values = [rmse(kl_by_hand(s, b)) for s, b in zip(student, base, strict=True)]
    return sum(values) / len(values)


def mean_nll(model, texts):
    return sum(nll_by_hand(model, c) for c in texts) / len(texts)


def test_training_lowers_the_nll(gemma, texts):
    before = mean_nll(gemma, texts)
    with baked(gemma, [heal(gemma, texts, PLAIN)]):
        assert mean_nll(gemma, texts) < before - 0.5


def test_the_barrier_keeps_the_student_near_base(gemma, texts):
    loose = train_adapter(gemma, texts, PLAIN)
    held = train_adapter(gemma, texts, HELD)
    free, bound = (d_by_hand(gemma, [h.adapter], texts) for h in (loose, held))
    assert free > 2 * HELD.tau
    assert abs(bound - HELD.tau) < 0.5 * abs(free - HELD.tau)
    assert (loose.barrier, loose.epoch_mean("lam")) == ("off", 0.0)


def test_only_the_adapter_is_trained(gemma, texts):
    before = {name: p.clone() for name, p in gemma.named_parameters()}
    healed = train_adapter(gemma, texts, HELD)
    assert all(p.grad is None for p in gemma.parameters())
    assert all(torch.equal(p, before[name]) for name, p in gemma.named_parameters())
    assert healed.moved
    assert min(healed.adapter.norms().values()) > 0
    assert not any(p.requires_grad for p in healed.adapter.parameters())
    assert all(step.grad_adapter > 0 for step in healed.steps)
    assert hook_count(gemma) == 0


def test_the_first_step_starts_from_an_exact_identity(gemma, texts):
    (first, *_) = train_adapter(gemma, texts, replace(HELD, tau=0.0, batch_size=8)).steps
    assert (first.d, first.fired, first.tokens_over, first.grad_barrier) == (0.0, 0.0, 0.0, 0.0)
    assert first.nll == pytest.approx(mean_nll(gemma, texts), rel=1e-5)


def test_prompt_and_padding_have_no_loss(gemma, texts):
    # At lr 0 every step measures base, so equal batches of any size average to the same number.
    expected = mean_nll(gemma, texts[:4])
    for size in (1, 2, 4):
        config = replace(PLAIN, lr=0.0, epochs=1, batch_size=size)
        healed = train_adapter(gemma, texts[:4], config)
        assert len(healed.steps) == 4 / size
        assert healed.epoch_mean("nll") == pytest.approx(expected, rel=1e-5)
    # One token after a long prompt: the prompt's tokens are no targets.
    one = replace(texts[0], tokens=texts[0].tokens[:1])
    (step,) = train_adapter(gemma, [one], replace(PLAIN, lr=0.0, epochs=1)).steps
    assert step.nll == pytest.approx(nll_by_hand(gemma, one), rel=1e-5)


def test_the_log_of_a_later_step_equals_full_logits(gemma, texts):
    # The second step of one batch measures the adapter that a run of one epoch returns.
    config = replace(HELD, batch_size=8, lr=5e-2, tau=0.05)
    two = train_adapter(gemma, texts, replace(config, epochs=2)).steps
    one = heal(gemma, texts, replace(config, epochs=1))
    assert two[1].d == pytest.approx(d_by_hand(gemma, [one], texts), rel=1e-3)
    base = [log_p_by_hand(gemma, c) for c in texts]
    with baked(gemma, [one]):
        kls = [kl_by_hand(log_p_by_hand(gemma, c), b) for c, b in zip(texts, base, strict=True)]
        assert two[1].nll == pytest.approx(mean_nll(gemma, texts), rel=1e-4)
    assert two[1].fired == sum(rmse(kl) > 0.05 for kl in kls) / 5
    assert two[1].tokens_over == pytest.approx(float((torch.cat(kls) > 0.05).double().mean()))


def test_the_effect_of_the_barrier_is_reported(gemma, texts):
    weak = replace(HELD, tau=0.01, lam=1e-4, calibrate=False)
    assert train_adapter(gemma, texts, replace(HELD, tau=99.0)).barrier == "never fired"
    assert train_adapter(gemma, texts, weak).barrier == "fired but did not bind"
    strong = replace(HELD, epochs=12, lam=8.0, tau=0.3)
    healed = train_adapter(gemma, texts, strong)
    assert any(step.fired > 0 for step in healed.steps)
    assert healed.barrier == "bound"
    assert healed.epoch_mean("d") <= 1.1 * 0.3


def test_reference_base_and_prev(gemma, texts):
    one_step = replace(HELD, batch_size=8, epochs=2)
    prev = replace(one_step, reference="prev")
    earlier = random_adapter(gemma, size=0.4)
    with baked(gemma, [earlier]):
        to_base, to_prev = (train_adapter(gemma, texts, c) for c in (one_step, prev))
    assert to_base.steps[0].d == pytest.approx(d_by_hand(gemma, [earlier], texts), rel=1e-3)
    assert to_base.steps[0].d > HELD.tau
    assert to_prev.steps[0].d == 0.0
    assert to_prev.steps[1].d > 0.0
    assert to_base.steps[0].nll == to_prev.steps[0].nll
    # Without an earlier adapter both references are equal.
    alone = [heal(gemma, texts, c) for c in (one_step, prev)]
    pairs = zip(alone[0].parameters(), alone[1].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_nan_in_training_names_step_and_site(gemma, texts, monkeypatch):
    made = []

    def fresh(*args, **kwargs):
        made.append(fresh_adapter(*args, **kwargs))
        return made[-1]

    def poison(step, total, _):
        assert total == 12  # 6 epochs of 2 batches
        if step.step == 2:
            next(iter(made[-1].up.values())).data.fill_(torch.nan)

    monkeypatch.setattr(import_module("shl.method.heal"), "fresh_adapter", fresh)
    with pytest.raises(ShlError) as error:
        train_adapter(gemma, texts, HELD, index=5, rounds=9, on_step=poison)
    sentence = one_sentence(error)
    assert sentence.startswith("epoch 1, step 3: a hidden state is nan")
    assert sentence.endswith(f"{made[0].sites[0].layer}.attn.hook_q.")
    assert hook_count(gemma) == 0


def test_training_without_tokens_is_rejected(gemma):
    with pytest.raises(ShlError, match="0 completions"):
        heal(gemma, [])
    with pytest.raises(ShlError, match="1 completions, all empty"):
        heal(gemma, [Completion(Prompt("?"), "", (), (2,))])


def test_token_divergence_equals_that_of_full_logits(gemma, texts):
    adapter = random_adapter(gemma)
    base = log_p_by_hand(gemma, texts[0])
    with baked(gemma, [adapter]):
        expected = kl_by_hand(log_p_by_hand(gemma, texts[0]), base)
        found = token_divergence(gemma, texts[0])
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-6)
    assert float(expected.max()) > 0.1
    assert token_divergence(gemma, texts[0]).tolist() == [0.0] * len(texts[0].tokens)
