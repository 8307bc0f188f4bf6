"""Training compared with full logits in float64: loss, barrier, log."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from helpers import hook_count, kl_by_hand, log_p_by_hand, nll_by_hand, one_sentence, random_adapter

from shl.config import HealConfig
from shl.hooks.adapter import fresh_adapter
from shl.hooks.bake import baked
from shl.method.barrier import Barrier
from shl.method.heal import Healed, HealStep, _set_lr, heal, train_adapter
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


@pytest.mark.parametrize("divergence", ["kl_rev", "kl_fwd"])
def test_gradient_is_that_of_the_loss_on_full_logits(divergence, gemma, texts):
    """d/dA, d/dB of mean(NLL + 3 relu(rmse KL - tau)), by autograd through float64 softmaxes."""
    config = replace(HELD, batch_size=8, divergence=divergence)
    adapter = fresh_adapter(gemma, config, seed=1)
    for up in adapter.up.values():
        up.data = 0.1 * torch.randn(up.shape, generator=torch.Generator().manual_seed(len(up)))
    base = [log_p_by_hand(gemma, c) for c in texts]
    with adapter.attach(gemma) as handle:
        terms = Barrier(gemma, adapter, handle, [texts], config).backward(0, 3.0)
        found = [p.grad for p in adapter.parameters()]
        loss = 0.0
        for c, reference in zip(texts, base, strict=True):
            row = torch.tensor([[*c.prompt_tokens, *c.tokens]])
            log_p = gemma(row)[0].double().log_softmax(-1)[len(c.prompt_tokens) - 1 : -1]
            nll = -log_p[torch.arange(len(log_p)), list(c.tokens)].mean()
            pair = (log_p, reference) if divergence == "kl_rev" else (reference, log_p)
            d = kl_by_hand(*pair).square().mean().sqrt()
            loss = loss + (nll + 3.0 * torch.relu(d - config.tau)) / len(texts)
        expected = torch.autograd.grad(loss, adapter.parameters())
    assert terms["fired"] > 0.5
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other.float(), rtol=2e-3, atol=2e-4 * float(other.abs().max()))


def test_learning_rate_rises_over_a_tenth_and_falls_to_a_tenth(gemma, texts):
    (optimiser := torch.optim.SGD([torch.zeros(1)], lr=9.0)).zero_grad()
    rates = []
    for step in range(20):
        _set_lr(optimiser, 1.0, step, 20)
        rates.append(optimiser.param_groups[0]["lr"])
    # 2 of 20 steps up, then 18 down: 1 - 0.9 n / 18 after the n-th.
    assert rates == pytest.approx([0.5, 1.0, *(1 - 0.9 * n / 18 for n in range(18))])
    # AdamW's first step moves every entry with a gradient by the learning rate: half of the peak.
    first = []
    train_adapter(
        gemma,
        texts,
        replace(PLAIN, epochs=20, batch_size=8, lr=1e-3),
        on_step=lambda step, _, state: first.append(state().tensors) if step.step == 0 else None,
    )
    sizes = [float(x.abs().max()) for name, x in first[0].items() if name.endswith(".B")]
    assert sizes == pytest.approx([0.5e-3] * len(sizes), rel=1e-3)


def test_every_epoch_has_every_batch_in_another_order(gemma, texts):
    # At lr 0 the NLL of a step tells which completion it was.
    losses = [nll_by_hand(gemma, c) for c in texts]
    steps = train_adapter(gemma, texts, replace(PLAIN, lr=0.0, epochs=4, batch_size=1)).steps
    orders = []
    for epoch in range(4):
        seen = [step.nll for step in steps if step.epoch == epoch]
        orders.append([min(range(5), key=lambda i, x=x: abs(losses[i] - x)) for x in seen])
    assert [sorted(order) for order in orders] == [list(range(5))] * 4
    assert len({tuple(order) for order in orders}) > 2


@pytest.mark.parametrize(("d", "outcome"), [(0.55, "bound"), (0.56, "fired but did not bind")])
def test_barrier_binds_up_to_one_tenth_above_tau(d, outcome, gemma):
    step = HealStep(0, 0, 1.0, d, 1.0, 0.5, 0.5, 1.0, 1.0, 1.0)
    config = replace(HELD, epochs=1, tau=0.5)
    assert Healed(random_adapter(gemma), (step,), config).barrier == outcome
