"""Options of training, the schedule and calibration of lam, and the penalties."""

import itertools
import math
from dataclasses import fields, replace
from importlib import import_module

import pytest
import torch
from helpers import random_adapter

from shl.config import HealConfig
from shl.hooks.adapter import fresh_adapter, singular_value_penalty
from shl.kl import reverse_kl_and_nll
from shl.method.barrier import Teacher
from shl.method.heal import Healed, HealStep, _next_lam, heal, train_adapter
from shl.models.generate import generate

# One epoch is four steps; the barrier fires from the second on.
SMALL = HealConfig(
    rank=2, sites=("o", "down"), layers=(1, 2), epochs=2, lr=2e-2, batch_size=1, tau=0.01
)
OPTIONS = {
    "rank": 3,
    "lora_alpha": 8.0,
    "sites": ("q", "down"),
    "layers": (1, 3),
    "epochs": 3,
    "lr": 1e-2,
    "batch_size": 2,
    "every": 2,
    "max_grad_norm": 0.01,
    "divergence": "kl_fwd",
    "aggregate": "max",
    "tau": 0.05,
    "lam": 2.0,
    "lam_final": 0.5,
    "lam_schedule": "power",
    "lam_power": -3.0,
    "calibrate": False,
    "calibrate_rate": 0.5,
    "lam_max": 1.0,
    "weight_decay": 1.0,
    "sv_penalty": 10.0,
}


@pytest.fixture
def texts(gemma):
    prompts = ["Hi?", "Why is that so?", "A b?", "What now?"]
    return generate(gemma, prompts, max_new_tokens=8, min_new_tokens=4, seed=2)


def train(gemma, texts, config, seed=0):
    """The second round of two, so that the schedules have moved."""
    return train_adapter(gemma, texts, config, index=1, rounds=2, seed=seed)


def same(one, two):
    if one.sites != two.sites:
        return False
    return all(map(torch.equal, one.parameters(), two.parameters()))


def top_singular_values(adapter):
    dense = [adapter.scale * adapter.up[s.name] @ adapter.down[s.name] for s in adapter.sites]
    return torch.stack([torch.linalg.svdvals(x)[0] for x in dense])


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_changes_the_adapter(option, gemma, texts):
    config = replace(SMALL, lam_schedule="power") if option == "lam_power" else SMALL
    before = train(gemma, texts, config)
    after = train(gemma, texts, replace(config, **{option: OPTIONS[option]}))
    assert not same(before.adapter, after.adapter)


def test_every_option_is_tested():
    # The reference is tested in test_heal.py, rows in tests/utils/test_halving.py, the soft target
    # and what belongs to it in test_heal_soft.py and test_loop_controls.py.
    elsewhere = {"reference", "rows", "target", "positions", "clip", "odd"}
    elsewhere |= {"unsteered", "narrative"}
    assert {*OPTIONS} | elsewhere == {field.name for field in fields(HealConfig)}


def test_shapes_and_steps_follow_the_settings(gemma, texts):
    config = replace(SMALL, rank=3, lora_alpha=6.0, sites=("q", "down"), layers=(0, 3), epochs=3)
    healed = train(gemma, texts, replace(config, batch_size=3))
    adapter = healed.adapter
    assert [s.name for s in adapter.sites] == [
        *("blocks.0.q", "blocks.0.down", "blocks.3.q", "blocks.3.down")
    ]
    assert adapter.down["blocks.0.q"].shape == (3, 32)
    assert adapter.up["blocks.3.down"].shape == (32, 3)
    assert adapter.scale == 6.0 / 3
    # Four texts in batches of 3 and 1, three times over.
    assert [(s.epoch, s.step) for s in healed.steps] == [(k // 2, k) for k in range(6)]


def test_d_is_ordered_by_aggregate(gemma, texts):
    # The second step of one batch measures the same adapter whatever the aggregate: D was 0 at
    # the first, so no barrier has acted yet.
    config = replace(SMALL, batch_size=4)
    d = [
        train(gemma, texts, replace(config, aggregate=how)).steps[1].d
        for how in ("mean", "rmse", "max", "p100")
    ]
    assert 0 < d[0] < d[1] < d[2]
    assert d[2] == pytest.approx(d[3], rel=1e-6)


def test_training_is_a_function_of_the_seed(gemma, texts):
    one, two, other = (heal(gemma, texts, SMALL, seed=seed) for seed in (3, 3, 4))
    assert same(one, two)
    assert not same(one, other)


def test_a_smaller_learning_rate_gives_a_smaller_update(gemma, texts):
    plain = replace(SMALL, divergence="none")
    moved = [
        sum(train(gemma, texts, replace(plain, lr=lr)).adapter.norms().values())
        for lr in (0.0, 1e-3, 2e-2)
    ]
    assert moved[0] == 0.0 < moved[1] < moved[2]


def test_the_schedule_of_lam_by_hand():
    linear = HealConfig(lam=1.0, lam_final=0.3)
    # 1 - 0.7 * i / 3
    assert [linear.lam_at(i, 4) for i in range(4)] == pytest.approx([1.0, 0.766667, 0.533333, 0.3])
    assert linear.lam_at(0, 1) == 1.0
    assert [HealConfig(lam=2.0).lam_at(i, 3) for i in range(3)] == [2.0] * 3
    power = HealConfig(lam=2.0, lam_schedule="power", lam_power=-0.5)
    assert [power.lam_at(i, 9) for i in (0, 3, 8)] == pytest.approx([2.0, 1.0, 2 / 3])


def test_lam_is_the_scheduled_one_without_calibration(gemma, texts):
    fixed = replace(SMALL, calibrate=False, lam=1.0, lam_final=0.4)
    assert {step.lam for step in train(gemma, texts, fixed).steps} == {0.4}
    assert train(gemma, texts, replace(fixed, calibrate=True)).steps[0].lam == 0.4


def test_calibration_raises_lam_while_d_is_above_tau(gemma, texts):
    config = replace(SMALL, lam=1.0, lam_max=1.6, epochs=4, calibrate_rate=0.15)
    steps = train(gemma, texts, config).steps
    assert max(step.lam for step in steps) == 1.6
    assert min(step.lam for step in steps) == 1.0
    for now, then in itertools.pairwise(steps):
        # log lam moves by the rate times (D - tau) / max(tau, 0.1), cut at 1.
        error = max(-1.0, min(1.0, (now.d - 0.01) / 0.1))
        assert then.lam == pytest.approx(
            min(1.6, max(1.0, now.lam * math.exp(0.15 * error))), rel=1e-6
        )
        assert then.lam > now.lam or now.d <= 0.01 or now.lam == 1.6
    assert sum(step.d > 0.01 for step in steps) > 8
    # With tau above D the barrier does not fire, and lam stays at its floor.
    idle = train(gemma, texts, replace(config, tau=50.0)).steps
    assert {step.lam for step in idle} == {1.0}


@pytest.mark.parametrize(
    ("lam", "d", "tau", "expected"),
    [
        (2.0, 0.75, 0.5, 2 * math.exp(0.1 * 0.5)),  # (0.75 - 0.5) / 0.5
        (2.0, 0.25, 0.5, 2 * math.exp(-0.1 * 0.5)),
        (2.0, 0.5, 0.5, 2.0),
        (2.0, 9.0, 0.5, 2 * math.exp(0.1)),  # cut at 1
        (2.0, 0.06, 0.01, 2 * math.exp(0.1 * 0.5)),  # 0.05 / 0.1, no smaller tau divides
        (4.9, 9.0, 0.5, 5.0),  # lam_max
        (1.5, 0.0, 0.5, 1.4),  # the floor: 1.5 exp(-0.1) is 1.357
    ],
)
def test_the_next_lam_by_hand(lam, d, tau, expected):
    config = HealConfig(tau=tau, calibrate_rate=0.1, lam_max=5.0)
    assert _next_lam(lam, d, config, 1.4) == pytest.approx(expected, rel=1e-12)


def test_means_of_epochs_by_hand(gemma):
    steps = tuple(
        HealStep(epoch, k, nll, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0)
        for k, (epoch, nll) in enumerate([(0, 1.0), (0, 3.0), (0, 5.0), (1, 7.0), (1, 8.0)])
    )
    healed = Healed(random_adapter(gemma), steps, SMALL)
    assert healed.epochs == 2
    # (1 + 3 + 5) / 3 and (7 + 8) / 2
    assert [healed.epoch_mean("nll", epoch) for epoch in (0, 1, -1, -2)] == [3.0, 7.5, 7.5, 3.0]
    assert healed.epoch_mean("nll") == 7.5


def test_heal_is_train_adapter_without_the_log(gemma, texts):
    """With every argument other than its default."""
    teacher = Teacher(persona="You are calm.")
    config = HealConfig(rank=1, sites=("q",), layers=(1,), epochs=1, batch_size=2, target="soft")
    adapter = heal(gemma, texts[:2], config, seed=5, teacher=teacher)
    assert same(adapter, train_adapter(gemma, texts[:2], config, seed=5, teacher=teacher).adapter)
    assert not same(adapter, heal(gemma, texts[:2], config, seed=6, teacher=teacher))


def test_weight_decay_shrinks_the_adapter(gemma, texts):
    plain = replace(SMALL, divergence="none", epochs=4)
    norms, decayed = (
        train(gemma, texts, replace(plain, weight_decay=decay)).adapter.norms()
        for decay in (0.0, 20.0)
    )
    assert all(decayed[name] < 0.9 * norm for name, norm in norms.items())


def test_the_penalty_lowers_the_largest_singular_value(gemma, texts):
    plain = replace(SMALL, divergence="none", epochs=4)
    free, held = (
        top_singular_values(train(gemma, texts, replace(plain, sv_penalty=weight)).adapter)
        for weight in (0.0, 1.0)
    )
    assert held.mean() < 0.8 * free.mean()


def test_the_penalty_and_its_gradient_by_hand(gemma):
    adapter = random_adapter(gemma, ("q", "down"), (0, 2))
    for p in adapter.parameters():
        p.requires_grad_(True)
    expected = top_singular_values(adapter).square().mean()
    found = singular_value_penalty(adapter, iterations=200)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    # The default of twelve iterations gives a slightly smaller value.
    rough = float(singular_value_penalty(adapter).detach() / expected.detach())
    assert 0.9 < rough <= 1.0 + 1e-5
    grads = [torch.autograd.grad(x, adapter.parameters()) for x in (expected, found)]
    for truth, ours in zip(*grads, strict=True):
        assert (truth - ours).abs().max() <= 1e-2 * truth.abs().max()
    assert float(singular_value_penalty(fresh_adapter(gemma, SMALL)).detach()) == 0.0


def test_the_kl_gradient_is_formed_on_demand_while_few_completions_fire(gemma, texts, monkeypatch):
    used, kernel = [], import_module("shl.method.barrier")

    def recorded(*args, lazy, **more):
        used.append(lazy)
        return reverse_kl_and_nll(*args, lazy=lazy, **more)

    monkeypatch.setattr(kernel, "reverse_kl_and_nll", recorded)
    train(gemma, texts, replace(SMALL, tau=100.0))
    assert used == [False] + [True] * 7
    used.clear()
    train(gemma, texts, replace(SMALL, tau=0.0, epochs=1))
    assert used == [False, True, False, False]  # D is 0, and not above tau, before the first update
