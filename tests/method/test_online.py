"""On-policy training compared with full logits in float64, and what its settings change."""

import math
from dataclasses import replace
from functools import partial
from importlib import import_module

import pytest
import torch
from helpers import (
    hook_count,
    kl_by_hand,
    lenient,
    log_p_by_hand,
    one_sentence,
    random_adapter,
    small_loop,
)

from shl.config import GenerateConfig, HealConfig, OnlineConfig, VectorConfig
from shl.hooks.bake import baked
from shl.method import online
from shl.method.axes import axis_from, load_axis
from shl.method.barrier import Barrier, Teacher
from shl.method.extract import extract_configured
from shl.method.filters import Verdict, judge
from shl.method.heal import Training
from shl.method.loop import StarvedError, love
from shl.method.online import rewards, train_online
from shl.models.generate import generate
from shl.models.tokens import Prompt, encode
from shl.utils.errors import ShlError

AXIS = load_axis("love")
PLAIN = HealConfig(rank=4, lr=2e-2, divergence="none")
CONFIG = small_loop(
    mode="online",
    generate=GenerateConfig(max_new_tokens=12, min_new_tokens=6),
    heal=PLAIN,
    online=OnlineConfig(every=6, refresh=2, prompts=3, rows=4, share=1.0),
)
REWARD = replace(CONFIG, online=replace(CONFIG.online, objective="reward"))
DOSE = 4.0


@pytest.fixture(autouse=True)
def every_text_passes(monkeypatch):
    lenient(monkeypatch)


@pytest.fixture
def vector(gemma):
    return extract_configured(gemma, AXIS, CONFIG.vector, seed=CONFIG.seed)


def train(model, vector, config=CONFIG, **more):
    return train_online(model, AXIS, vector, DOSE, config, **more)


def mean_kl(model, texts, student, teacher):
    """Mean over texts of the mean KL(student || teacher) per token, from two full softmaxes."""
    with student():
        own = [log_p_by_hand(model, c) for c in texts]
    with teacher():
        taught = [log_p_by_hand(model, c) for c in texts]
    each = [float(kl_by_hand(s, t).mean()) for s, t in zip(own, taught, strict=True)]
    return sum(each) / len(each)


def adapter_gradient(model, adapter, loss):
    """The gradient of `loss(log_p)` at A and B, where `log_p(completion)` are float64
    log-probabilities of the hooked model."""

    def log_p(c):
        row = torch.tensor([[*c.prompt_tokens, *c.tokens]])
        return model(row)[0].double().log_softmax(-1)[len(c.prompt_tokens) - 1 : -1]

    return torch.autograd.grad(loss(log_p), adapter.parameters(), allow_unused=True)


def trainable(model):
    adapter = random_adapter(model, size=0.3)
    for parameter in adapter.parameters():
        parameter.requires_grad_(True)
    return adapter


def assert_equal_gradients(adapter, expected):
    for parameter, by_hand in zip(adapter.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, by_hand, rtol=1e-3, atol=1e-6)


def test_the_loss_is_the_mean_kl_of_the_student_to_its_steered_self(gemma, vector):
    texts = generate(gemma, ["Hi?", "Why is that so?"], max_new_tokens=9, min_new_tokens=4)
    adapter = trainable(gemma)
    steering = partial(vector.steering, gemma, DOSE)
    with adapter.attach(gemma) as handle:
        # The adapter is on in both, so the teacher is the current student.
        def student():
            return baked(gemma, ())

        by_hand = mean_kl(gemma, texts, student, steering)
        with torch.no_grad(), steering():
            taught = [log_p_by_hand(gemma, c) for c in texts]

        def loss(log_p):
            own = [log_p(c) for c in texts]
            kl = [kl_by_hand(s, t).mean() for s, t in zip(own, taught, strict=True)]
            return torch.stack(kl).mean()

        expected = adapter_gradient(gemma, adapter, loss)
        barrier = Barrier(
            gemma, adapter, handle, [texts], PLAIN, teacher=Teacher(steering), on_policy=True
        )
        terms = barrier.backward(0, 0.0)
    assert terms["nll"] == pytest.approx(by_hand, rel=1e-4)
    assert by_hand > 1e-3
    assert_equal_gradients(adapter, expected)


@pytest.mark.parametrize("rows", [None, 1])
def test_weights_scale_each_token(gemma, rows):
    texts = generate(gemma, ["Hi?", "Why is that so?"], max_new_tokens=9, min_new_tokens=4)
    adapter = trainable(gemma)
    counts = [len(c.tokens) for c in texts]
    weights = torch.linspace(-1, 2, sum(counts))
    with adapter.attach(gemma) as handle:

        def loss(log_p):
            parts = weights.double().split(counts)
            each = [
                -(w * log_p(c)[torch.arange(len(w)), list(c.tokens)]).mean()
                for c, w in zip(texts, parts, strict=True)
            ]
            return torch.stack(each).mean()

        expected = adapter_gradient(gemma, adapter, loss)
        config = replace(PLAIN, batch_size=2, rows=rows)
        Barrier(gemma, adapter, handle, [texts], config, weights=[weights]).backward(0, 0.0)
    assert_equal_gradients(adapter, expected)


def held_out_kl(model, vector, adapters=()):
    """KL of the student to base's steered self on texts of other prompts."""
    texts = generate(model, list(AXIS.prompts[20:24]), max_new_tokens=12, min_new_tokens=8, seed=9)
    return mean_kl(model, texts, lambda: baked(model, adapters), lambda: vector.steering(model, 4))


def test_the_student_moves_towards_its_teacher_on_held_out_prompts(gemma, vector):
    axis = replace(AXIS, prompts=AXIS.prompts[:12])
    # Many more steps would take it beyond this teacher, since it is steered again at each.
    settings = replace(CONFIG.online, every=8, refresh=8, prompts=6)
    config = replace(CONFIG, online=settings, heal=replace(PLAIN, lr=2e-3))
    healed = train_online(gemma, axis, vector, DOSE, config)
    assert held_out_kl(gemma, vector, [healed.adapter]) < held_out_kl(gemma, vector) / 2
    assert hook_count(gemma) == 0


def test_the_barrier_holds_d_at_tau(gemma, vector):
    tau, settings = 0.02, replace(CONFIG.online, every=60, refresh=10)
    held = replace(PLAIN, divergence="kl_rev", tau=tau, lam=8.0, calibrate_rate=0.5)
    near = train(gemma, vector, replace(CONFIG, online=settings, heal=held))
    assert 0.3 * tau < near.epoch_mean("d") < 1.5 * tau
    assert near.barrier in ("bound", "fired but did not bind")
    # Without a bound the student is far after half as many steps.
    loose, half = replace(held, tau=1e6), replace(settings, every=30)
    assert train(gemma, vector, replace(CONFIG, online=half, heal=loose)).epoch_mean("d") > 4 * tau
    assert train(gemma, vector).barrier == "off"


@pytest.mark.parametrize("config", [CONFIG, REWARD], ids=["teacher", "reward"])
def test_a_resumed_training_ends_with_the_same_bits(gemma, vector, config):
    states = []
    whole = train(gemma, vector, config, on_step=lambda *args: states.append(args[2]()))
    assert len(states) == 6
    for state in states:
        again = train(gemma, vector, config, resume=state)
        assert again.steps == whole.steps
        pairs = zip(again.adapter.parameters(), whole.adapter.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_state_is_read_as_it_was_written(gemma, vector, tmp_path):
    states = []
    train(gemma, vector, REWARD, on_step=lambda *args: states.append(args[2]()))
    states[3].save(tmp_path / "training.safetensors")
    read = Training.load(tmp_path / "training.safetensors")
    assert read.steps == states[3].steps
    assert read.tensors.keys() == states[3].tensors.keys()
    assert all(torch.equal(x, states[3].tensors[name]) for name, x in read.tensors.items())


def test_the_vector_is_extracted_anew_from_the_current_student(gemma, vector):
    seen = []

    def on_step(step, total, state):
        found = state().tensors
        seen.append((step.epoch, found["vector.1"], state().tensors))

    config = replace(CONFIG, heal=replace(PLAIN, lr=5e-2))
    train(gemma, vector, config, on_step=on_step)
    assert [epoch for epoch, *_ in seen] == [0, 0, 1, 1, 2, 2]
    first, second, third = (seen[i][1] for i in (0, 2, 4))
    assert torch.equal(first, vector.directions[1])
    assert torch.equal(seen[1][1], first)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_a_random_vector_stays(gemma, vector):
    seen = []
    config = replace(CONFIG, vector=VectorConfig(contexts=3, direction="random"))
    train(gemma, vector, config, on_step=lambda *args: seen.append(args[2]().tensors["vector.1"]))
    assert all(torch.equal(x, vector.directions[1]) for x in seen)


def test_the_reward_by_hand(gemma):
    texts = generate(gemma, ["Hi?", "Why is that so?"], max_new_tokens=9, min_new_tokens=4)
    verdicts = [Verdict(texts[0], (), 30.0, 9.0), Verdict(texts[1], ("soup",), 8.0, 9.0)]
    config = replace(REWARD, online=replace(REWARD.online, perplexity=15.0, penalty=0.7))
    for number in (0, 1, 2):
        expected = []
        for v in verdicts:
            own, opposite = (
                log_p_by_hand(gemma, as_asked(gemma, v.completion, persona))
                for persona in AXIS.paraphrases[number % 2]
            )
            at = torch.arange(len(own)), list(v.completion.tokens)
            expected.append(float((own[at] - opposite[at]).mean()))
        # log(30 / 15) above the limit, and one that the filter drops.
        expected = [expected[0] - math.log(2.0), expected[1] - 0.7]
        found = rewards(gemma, AXIS, verdicts, config, paraphrase=number)
        assert found == pytest.approx(expected, abs=1e-4)


def as_asked(model, completion, persona):
    prompt = Prompt(completion.prompt.text, persona)
    return replace(completion, prompt=prompt, prompt_tokens=tuple(encode(model, prompt)))


def test_groups_doses_and_weights(gemma, vector, monkeypatch):
    """Rewards 0 to 11 in three groups of four: each group's mean is 1.5 above its first, so the
    advantages are -1.5, -0.5, 0.5 and 1.5; of the steered two both are positive. In a second call
    the order is reversed, and the steered two, with -0.5 and -1.5, are left out."""
    for reverse in (False, True):
        monkeypatch.setattr(
            online,
            "rewards",
            lambda model, axis, verdicts, *_, reverse=reverse, **__: [
                float(i) for i in range(len(verdicts))
            ][:: -1 if reverse else 1],
        )
        batch = online._batch(gemma, AXIS, vector, DOSE, REWARD, (0, 0))
        assert batch.reward == 5.5
        every = [v.completion for v in batch.verdicts]
        assert [c.dose for c in every] == [0.0, 0.0, 2.0, 4.0] * 3
        assert len({c.prompt.text for c in every}) == 3
        assert all(len({c.prompt.text for c in every[i : i + 4]}) == 1 for i in (0, 4, 8))
        advantage = [-1.5, -0.5, 0.5, 1.5] * 3
        if reverse:
            advantage = [-a for a in advantage]
        used = [i for i, c in enumerate(every) if c.dose == 0 or advantage[i] > 0]
        assert len(used) == (6 if reverse else 12)
        assert list(batch.texts) == [every[i] for i in used]
        assert batch.weights is not None
        parts = batch.weights.split([len(every[i].tokens) for i in used])
        for i, weight in zip(used, parts, strict=True):
            c = every[i]
            own = log_p_by_hand(gemma, c)
            with vector.steering(gemma, c.dose):
                steered = log_p_by_hand(gemma, c)
            at = torch.arange(len(own)), list(c.tokens)
            ratio = (own[at] - steered[at]).exp().clamp(max=2.0)
            # Mean over 12 completions of a sum over tokens, by 12 new tokens at most; the barrier
            # takes means over the used ones and over their tokens.
            factor = advantage[i] * len(used) / 12 * len(c.tokens) / 12
            torch.testing.assert_close(weight.double(), factor * ratio, rtol=1e-3, atol=1e-5)


def test_the_reward_raises_what_it_rewards(gemma, vector, monkeypatch):
    """Completions are rewarded for their share of one token, which the student comes to write."""
    wanted = 7

    def shares(model, axis, verdicts, *_, **__):
        return [v.completion.tokens.count(wanted) / 12 for v in verdicts]

    monkeypatch.setattr(online, "rewards", shares)
    settings = replace(REWARD.online, every=30, prompts=4, rows=6)
    config = replace(REWARD, online=settings, heal=replace(PLAIN, lr=2e-2))
    steps = train(gemma, vector, config).steps
    first, last = (sum(s.reward for s in part) / 10 for part in (steps[:10], steps[-10:]))
    assert last > first + 0.05


CHANGES = [
    {"objective": "reward"},
    {"every": 5},
    {"share": 0.5},
    {"refresh": 1},
    {"prompts": 2},
    {"objective": "reward", "rows": 6},
    {"objective": "reward", "ratio_cap": 0.5},
    {"objective": "reward", "perplexity": 2.0},
    {"objective": "reward", "penalty": 5.0},
]


def test_every_setting_changes_the_result(gemma, vector, monkeypatch):
    lenient(monkeypatch, reasons=lambda text: ["soup"] if len(text) % 2 else [])
    bias = [4.0, 8.0]  # perplexities, so that the limit of 2 matters
    monkeypatch.setattr(
        import_module("shl.method.filters"),
        "base_perplexities",
        lambda _, texts, **__: [(bias[len(c.text) % 2], 8.0) for c in texts],
    )
    start = replace(CONFIG.online, every=4, min_survival=0.0)
    found = [train(gemma, vector, replace(CONFIG, online=start))]
    found += [
        train(gemma, vector, replace(CONFIG, online=replace(start, **change))) for change in CHANGES
    ]
    found.append(train(gemma, vector, replace(CONFIG, online=start, prompted=True)))
    found += [
        train(gemma, vector, replace(CONFIG, online=start, heal=replace(PLAIN, **change)))
        for change in ({"clip": 1e-4}, {"odd": True, "target": "soft"}, {"every": 3})
        if "clip" not in change
    ]
    sums = [sum(float(p.abs().sum()) for p in h.adapter.parameters()) for h in found]
    assert len(set(sums)) == len(sums)


def test_texts_that_fail_the_filter_starve_the_run(gemma, vector, monkeypatch):
    lenient(monkeypatch, reasons=lambda text: ["soup"])
    with pytest.raises(StarvedError) as error:
        train(gemma, vector)
    assert one_sentence(error) == (
        "round 0, step 0: 0 of 3 completions of the student passed the filter and 3 of the last "
        "have a token, at least 10% must pass; dropped last: soup 3."
    )
    free = replace(CONFIG, online=replace(CONFIG.online, min_survival=0.0))
    assert len(train(gemma, vector, free).steps) == 6


def test_a_diverging_student_ends_the_run(gemma, vector):
    heal = replace(PLAIN, divergence="kl_rev", tau=0.0, lr=0.5, calibrate=False, lam=1e-6)
    config = replace(CONFIG, heal=heal, online=replace(CONFIG.online, max_d=1.0))
    with pytest.raises(ShlError) as error:
        train(gemma, vector, config)
    assert "the student has diverged: D is" in one_sentence(error)
    assert "it must be at most 0.1" in str(error.value)


def test_settings_that_do_not_fit_are_refused(gemma, vector):
    axis = replace(AXIS, paraphrases=())
    with pytest.raises(ShlError) as error:
        train_online(gemma, axis, vector, DOSE, REWARD)
    assert "'love' has no paraphrases" in one_sentence(error)
    with pytest.raises(ShlError, match="no paraphrases"):
        next(love(gemma, axis, REWARD))
    with pytest.raises(ShlError) as error:
        replace(REWARD, prompted=True)
    assert "prompted is True with the objective 'reward'" in one_sentence(error)
    with pytest.raises(ShlError) as error:
        OnlineConfig(prompts=0)
    assert "prompts is 0" in one_sentence(error)


@pytest.mark.parametrize("pairs", ["one", [["a"]], [["a", "a"]], [["a", " "]], [["a", 3]]])
def test_paraphrases_are_pairs_of_different_texts(pairs):
    keys = ("name", "description", "positive", "negative", "contexts", "prompts", "expected")
    table = {key: getattr(AXIS, key) for key in keys} | {"paraphrases": pairs}
    with pytest.raises(ShlError) as error:
        axis_from(table, "love.toml")
    assert "paraphrases" in one_sentence(error)


def test_a_round_of_the_loop_is_online(gemma):
    r = next(love(gemma, AXIS, CONFIG))
    assert (r.kept, r.dreams) == ((), ())
    assert len(r.healing.steps) == CONFIG.online.every
    assert r.healing.moved
    assert "training" not in r.retained
    assert {v.completion.dose for v in r.steered.samples} == {r.dose}


def test_without_the_walk_one_batch_shows_the_dose(gemma):
    config = replace(CONFIG, dose=replace(CONFIG.dose, walk=False))
    r = next(love(gemma, AXIS, config))
    assert (len(r.dreams), len(r.probes), r.kept) == (config.dose.batch_size, 0, ())


def test_judging_is_left_to_the_filter(gemma, vector):
    """The verdicts that starve a run are those of `judge`."""
    batch = online._batch(gemma, AXIS, vector, DOSE, CONFIG, (0, 0))
    assert list(batch.verdicts) == judge(gemma, batch.texts, CONFIG.filter)
    assert not online._batch(gemma, AXIS, vector, DOSE, CONFIG, (0, 1)).verdicts
