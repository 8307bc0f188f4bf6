"""Controls of the loop: no steering, prompting, a random vector, no opposite persona."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from helpers import lenient, small_loop

from shl.config import DoseConfig, VectorConfig
from shl.hooks.bake import baked
from shl.method.axes import load_axis
from shl.method.extract import extract_vector
from shl.method.heal import train_adapter
from shl.method.loop import love
from shl.models.generate import generate, without_persona
from shl.models.tiny import tiny_gemma
from shl.models.tokens import Prompt, encode
from shl.utils.errors import ShlError

AXIS = load_axis("care_auth")
ONE = small_loop(rounds=1)
UNSTEERED = DoseConfig(alpha=0.0, walk=False, min_train=6, batch_size=6)


def first(config, model=None, axis=AXIS, **more):
    with pytest.MonkeyPatch.context() as patch:
        lenient(patch)
        return next(love(model or tiny_gemma(), axis, config, **more))


def test_completions_at_dose_0_are_unsteered():
    model = tiny_gemma()
    done = first(replace(ONE, dose=UNSTEERED), model)
    assert (done.probes, done.dose, len(done.kept)) == ((), 0.0, 6)
    assert all(c.dose == 0 and c.prompt.persona is None for c in done.kept)
    # Without steering the model is base.
    assert done.steered.coherence == pytest.approx(1.0, abs=1e-6)
    greedy = replace(ONE.generate, temperature=0.0)
    plain = first(replace(ONE, dose=UNSTEERED, generate=greedy), model)
    again = generate(model, [c.prompt for c in plain.kept], **vars(greedy))
    assert [c.tokens for c in plain.kept] == [c.tokens for c in again]
    assert without_persona(model, again[0]) is again[0]


def test_prompted_completions_are_trained_on_without_the_persona():
    model = tiny_gemma()
    greedy = replace(ONE.generate, temperature=0.0)
    personas = []
    instruments = {"persona": lambda _, persona: {"read": personas.append(persona)}}
    config = replace(ONE, dose=UNSTEERED, generate=greedy, prompted=True)
    done = first(config, model, instruments=instruments)
    assert personas == [AXIS.positive, None]  # the steered and the healed stage
    prompted = [Prompt(c.prompt.text, AXIS.positive) for c in done.kept]
    again = generate(model, prompted, **vars(greedy))
    assert [c.tokens for c in done.kept] == [c.tokens for c in again]
    for kept in done.kept:
        assert kept.prompt == Prompt(kept.prompt.text)
        assert list(kept.prompt_tokens) == encode(model, kept.prompt.text)
    assert all(v.completion.prompt.persona == AXIS.positive for v in done.dreams)
    # The stage is measured with the persona.
    assert done.steered.coherence != pytest.approx(1.0, abs=1e-6)


def test_prompting_and_steering_combine():
    done = first(replace(ONE, prompted=True))
    assert all(v.completion.prompt.persona == AXIS.positive for v in (*done.probes, *done.dreams))
    assert {c.dose for c in done.kept} == {1.5}


def test_against_no_persona_contrasts_with_the_question_alone():
    # Short, so that the tiny model's window of 8 tokens reaches from the tag to the persona.
    model, layers, questions = tiny_gemma(), (1, 2), ("a", "b", "c")
    axis = replace(AXIS, positive="K", negative="S", contexts=questions)
    vector = extract_vector(model, axis, layers, against="no_persona")
    config = replace(ONE, vector=VectorConfig(3, layers, against="no_persona"))
    extracted = first(config, model, axis).vector

    def residual(layer, persona, question):
        tokens = torch.tensor([encode(model, Prompt(question, persona))])
        _, cache = model.run_with_cache(tokens, names_filter=f"blocks.{layer}.hook_resid_post")
        return cache[f"blocks.{layer}.hook_resid_post"][0, -1]

    for layer in layers:
        by_hand = sum(residual(layer, "K", q) - residual(layer, None, q) for q in questions)
        assert torch.allclose(vector.directions[layer], by_hand / 3, atol=1e-6)
        assert torch.equal(extracted.directions[layer], vector.directions[layer])
    opposite = extract_vector(model, axis, layers)
    assert not torch.allclose(opposite.directions[1], vector.directions[1], atol=1e-3)


def test_removed_axes_are_projected_out_of_each_rounds_vector(monkeypatch):
    model = tiny_gemma()
    lenient(monkeypatch)
    removed = VectorConfig(3, (2, 3), remove=("valence", "length"))
    rounds = list(love(model, AXIS, small_loop(vector=removed)))
    adapters = []
    for done in rounds:
        with baked(model, adapters):
            whole = extract_vector(model, AXIS, (2, 3), contexts=3)
            others = [
                extract_vector(model, replace(load_axis(name), contexts=AXIS.contexts[:3]), (2, 3))
                for name in ("valence", "length")
            ]
        assert done.vector.rule == "mean_difference without valence, length"
        expected = whole.project_out(*others)
        for layer, v in done.vector.directions.items():
            assert torch.allclose(v, expected.directions[layer], atol=1e-6)
            assert not torch.allclose(v, whole.directions[layer], atol=1e-3)
        adapters.append(done.adapter)


def test_the_random_vector_replaces_the_axis_in_every_round(monkeypatch):
    seen = []

    def control(model, vector, prompts, *, dose, seed):
        seen.append((round(dose, 6), seed, len(prompts)))
        return replace(vector, rule="random")

    monkeypatch.setattr("shl.method.loop.random_like", control)
    config = small_loop(vector=VectorConfig(3, direction="random"))
    lenient(monkeypatch)
    rounds = list(love(tiny_gemma(), AXIS, config))
    # Two rungs, 1 and 0.2; the lower of the middle: 0.2 x alpha 1.5 = 0.3. One seed for all rounds.
    assert [(dose, n) for dose, _, n in seen] == [(0.3, 8)] * 2
    assert len({seed for _, seed, _ in seen}) == 1
    assert [r.vector.rule for r in rounds] == ["random", "random"]


def test_the_soft_target_teaches_the_steered_student_at_the_walked_dose(monkeypatch):
    calls = []
    heal = import_module("shl.method.loop")

    def recorded(model, texts, config, *, teacher, **more):
        with teacher() as steering:
            calls.append((len(texts), steering.dose, [c.dose for c in texts]))
        return train_adapter(model, texts, config, teacher=teacher, **more)

    monkeypatch.setattr(heal, "train_adapter", recorded)
    soft = replace(ONE.heal, target="soft", positions="all", unsteered=5)
    done = first(replace(ONE, heal=soft))
    [(count, dose, doses)] = calls
    assert count == len(done.kept) + 5
    assert dose == done.dose
    assert doses[-5:] == [0.0] * 5
    assert done.healing.steps[-1].nll < done.healing.steps[0].nll


def test_prompting_and_the_soft_target_exclude_each_other():
    with pytest.raises(ShlError, match="set one of them only"):
        replace(ONE, prompted=True, heal=replace(ONE.heal, target="soft"))
