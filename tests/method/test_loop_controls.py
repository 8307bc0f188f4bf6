"""Controls of the loop: no steering, prompting, a random vector, no opposite persona."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib import import_module

import pytest
import torch
from helpers import lenient, small_loop, with_drawn_contexts

from shl.config import DoseConfig, FilterConfig, GenerateConfig, VectorConfig
from shl.hooks.bake import baked
from shl.measure.continuations import conflict_items
from shl.measure.retention import retention, running_text
from shl.measure.vignettes import vignettes
from shl.method.axes import axis_names, load_axis
from shl.method.backtrack import dose_table
from shl.method.extract import extract_vector
from shl.method.heal import train_adapter
from shl.method.loop import READ, love
from shl.models.generate import generate, without_persona
from shl.models.tiny import tiny_gemma
from shl.models.tokens import Prompt, encode
from shl.utils.files import texts_in
from shl.utils.seeds import seed_for

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
        assert torch.allclose(extracted.directions[layer], by_hand / 3, atol=1e-6)
    opposite = extract_vector(model, axis, layers)
    assert not torch.allclose(opposite.directions[1], vector.directions[1], atol=1e-3)


def test_removed_axes_are_projected_out_of_each_rounds_vector(monkeypatch):
    model = tiny_gemma()
    lenient(monkeypatch)
    removed = VectorConfig(3, (2, 3), remove=("valence", "length"))
    rounds = list(love(model, AXIS, small_loop(vector=removed)))
    adapters = []
    axis = with_drawn_contexts(AXIS)
    for done in rounds:
        with baked(model, adapters):
            whole = extract_vector(model, axis, (2, 3), contexts=3)
            others = [
                extract_vector(model, replace(load_axis(name), contexts=axis.contexts[:3]), (2, 3))
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


def recorded_training(monkeypatch):
    """The texts and teachers that the loop trains with."""
    calls = []

    def recorded(model, texts, config, *, teacher, **more):
        calls.append((texts, teacher))
        return train_adapter(model, texts, config, teacher=teacher, **more)

    monkeypatch.setattr(import_module("shl.method.loop"), "train_adapter", recorded)
    return calls


def test_the_soft_target_teaches_the_steered_student_at_the_walked_dose(monkeypatch):
    calls = recorded_training(monkeypatch)
    soft = replace(ONE.heal, target="soft", positions="all", unsteered=5, narrative=3)
    done = first(replace(ONE, heal=soft))
    [(texts, teacher)] = calls
    with teacher.steering() as steering:
        assert steering.dose == done.dose
    assert teacher.opposite is teacher.persona is None
    assert texts[: len(done.kept)] == done.kept
    own = texts[len(done.kept) :]
    assert [c.dose for c in own] == [0.0] * 8
    assert [c.prompt.text for c in own[:5]] == list(AXIS.prompts[:5])
    assert [c.prompt for c in own[5:]] == [
        Prompt(text, plain=True) for text in texts_in("openings.toml", "openings")[:3]
    ]
    # Sampled from the whole distribution, without hooks.
    whole = vars(ONE.generate) | {"top_k": 0, "top_p": 1.0}
    expected = generate(
        tiny_gemma(), [c.prompt for c in own], **whole, seed=seed_for(ONE.seed, "own", 0)
    )
    assert [c.tokens for c in own] == [c.tokens for c in expected]
    assert done.healing.steps[-1].nll < done.healing.steps[0].nll


def test_the_odd_target_has_the_opposite_dose_too(monkeypatch):
    calls = recorded_training(monkeypatch)
    done = first(replace(ONE, heal=replace(ONE.heal, target="soft", odd=True)))
    [(_, teacher)] = calls
    with teacher.opposite() as steering:
        assert steering.dose == -done.dose


def test_the_soft_target_of_prompting_has_the_persona_and_no_steering(monkeypatch):
    calls = recorded_training(monkeypatch)
    soft = replace(ONE.heal, target="soft", positions="all")
    unsteered = replace(ONE.dose, alpha=0.0, walk=False)
    done = first(replace(ONE, prompted=True, dose=unsteered, heal=soft))
    [(texts, teacher)] = calls
    assert teacher.persona == AXIS.positive
    assert {c.prompt.persona for c in texts} == {None}
    # The persona changes the distributions, so there is something to learn.
    assert done.healing.steps[0].nll > 1e-3
    assert done.healing.steps[-1].nll < done.healing.steps[0].nll


def test_texts_of_the_training_never_hold_an_item():
    """No eight words in a row of an item stand in an opening, a prompt or a context."""
    axes = [load_axis(name) for name in axis_names()]
    items = [v.text for v in vignettes()] + [
        item.text((first, k, None)) for item in conflict_items() for first, k in SAID
    ]
    items += [text for axis in axes if axis.cloze for text in axis.cloze.openings]
    learnt = [*texts_in("openings.toml", "openings"), *(p for axis in axes for p in axis.prompts)]
    for text in learnt:
        for item in items:
            assert not (runs_of(text) & runs_of(item)), (text, item)
            assert not text.startswith(item), (text, item)
            assert not item.startswith(text), (text, item)


SAID = [("order", 0), ("order", 1), ("need", 0), ("need", 1)]


def runs_of(text, n=8):
    words = text.lower().split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def test_the_loop_reads_what_the_student_has_of_the_shift(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "shl.method.loop.running_text", lambda *a: asked.append(a[1]) or running_text(*a)
    )
    soft = replace(ONE.heal, target="soft", positions="all", epochs=20)
    done = first(replace(ONE, heal=soft))
    assert {*done.retained} >= {"training", "answers", "vignettes", "conflicts"}
    assert len({v.foundation for v in vignettes() if v.text in asked}) == READ
    assert done.retained["training"].share > 0.3
    still = first(replace(ONE, heal=replace(soft, lr=0.0, epochs=1)))
    assert still.retained["training"].share == pytest.approx(0.0, abs=1e-4)


def test_retention_of_a_later_round_is_between_its_own_students():
    soft = replace(ONE.heal, target="soft", positions="all", epochs=4)
    model = tiny_gemma()
    with pytest.MonkeyPatch.context() as patch:
        lenient(patch)
        one, two = love(model, AXIS, replace(ONE, rounds=2, heal=soft))
    read = partial(
        retention,
        model,
        [(c, c) for c in two.kept[:READ]],
        steering=lambda _: two.vector.steering(model, two.dose),
        student=partial(baked, model, [one.adapter, two.adapter]),
    )
    assert two.retained["training"] == read(entered=partial(baked, model, [one.adapter]))
    assert two.retained["training"] != read(entered=partial(baked, model, []))


def test_backtracking_applies_to_full_batches_alone():
    longer = GenerateConfig(max_new_tokens=24)
    config = replace(ONE, generate=longer, filter=FilterConfig(max_tail_perplexity=60.0))
    on = first(replace(config, dose=replace(ONE.dose, backtrack=True)))
    off = first(config)
    assert on.probes == off.probes
    rewound = 0
    for one, other in zip(on.dreams, off.dreams, strict=True):
        assert one.completion.dose == other.completion.dose == on.dose
        assert one.completion == other.completion or one.completion.rewinds
        rewound += bool(one.completion.rewinds)
    assert rewound > 0
    assert any(c.doses for c in on.kept)
    assert not any(c.rewinds for c in off.kept)
    # The teacher of a rewound text has the dose of each of its tokens.
    model = tiny_gemma()
    shares = [
        retention(
            model,
            [(c, c) for c in on.kept if c.tokens][:READ],
            entered=nullcontext,
            steering=lambda texts, of=of: on.vector.steering(model, of(texts)),
            student=partial(baked, model, [on.adapter]),
        ).teacher
        for of in (lambda texts: dose_table(texts, on.dose), lambda _: on.dose)
    ]
    assert on.retained["training"].teacher == pytest.approx(shares[0], rel=1e-4)
    assert on.retained["training"].teacher != pytest.approx(shares[1], rel=1e-2)
