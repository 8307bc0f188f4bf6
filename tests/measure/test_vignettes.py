"""The probe's data, its scores against full logits on single rows, and its evaluations."""

import re
from collections import Counter
from importlib import import_module

import numpy as np
import pytest
import torch
from helpers import random_adapter, tiny_llama

from shl.config import FOUNDATIONS, EvalConfig
from shl.hooks.bake import baked
from shl.hooks.vector import SteeringVector
from shl.measure.vignettes import evaluate, first_vignettes, probe_data, vignettes
from shl.models.tiny import tiny_gemma
from shl.utils.errors import ShlError

ALL = vignettes()
FEW = (*ALL[:7], ALL[20])
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<a>"


@pytest.fixture(autouse=True)
def few_vignettes(monkeypatch):
    probe = import_module("shl.measure.vignettes")
    monkeypatch.setattr(probe, "first_vignettes", lambda count: FEW[:count])


@pytest.fixture
def gemma():
    """A model of each test's own, so that no scores of base are cached."""
    return tiny_gemma()


@pytest.fixture
def llama():
    return tiny_llama()


@pytest.fixture
def chat():
    return tiny_gemma(chat_template=CHAT)


def steering():
    v = torch.randn(32, generator=torch.Generator().manual_seed(0))
    return SteeringVector({1: 2 * v}, "tiny", "demo", 1)


def log_p_of(model, context, continuation, bos=True):
    """Summed log-probability of a text after another, one unpadded row, float64."""
    ids = [model.tokenizer.encode(x, add_special_tokens=False) for x in (context, continuation)]
    row = [*[model.tokenizer.bos_token_id] * bos, *ids[0], *ids[1]]
    with torch.no_grad():
        log_p = model(torch.tensor([row]))[0].double().log_softmax(-1)
    start = len(row) - len(ids[1])
    return sum(float(log_p[start + k - 1, token]) for k, token in enumerate(ids[1]))


def words(text):
    return {word.lower() for word in re.findall("[A-Za-z]+", text)}


def test_each_foundation_has_twelve_different_scenes_of_similar_length():
    lengths = {f: [len(v.text.split()) for v in ALL if v.foundation == f] for f in FOUNDATIONS}
    assert {v.foundation for v in ALL} == set(FOUNDATIONS)
    assert min(map(len, lengths.values())) >= 12
    assert len({v.text for v in ALL}) == len(ALL)
    assert all(v.text.startswith("You see ") and v.text.endswith(".") for v in ALL)
    means = [np.mean(each) for each in lengths.values()]
    assert max(means) - min(means) <= 1


def test_some_vignettes_have_as_many_of_each_foundation_as_possible():
    found = {count: first_vignettes(count) for count in (7, 42, 45, 84)}
    assert found[84] == ALL
    for count, some in found.items():
        numbers = Counter(v.foundation for v in some)
        assert len(some) == len({v.text for v in some}) == count
        assert max(numbers.values()) - min(numbers[f] for f in FOUNDATIONS) <= 1
        assert [*some] == [v for v in ALL if v in some]
    with pytest.raises(ShlError, match="85 vignettes are asked for, it must be from 1 to 84"):
        first_vignettes(85)


def test_a_count_of_vignettes_is_that_of_the_reading_and_of_its_base(gemma, monkeypatch):
    monkeypatch.undo()
    few, more = (evaluate(gemma, config=EvalConfig(vignettes=count)) for count in (7, 14))
    chosen = first_vignettes(14)
    assert few.labels == tuple(v.foundation for v in first_vignettes(7))
    assert (len(few.log_probs), len(more.log_probs)) == (7, 14)
    at = [chosen.index(v) for v in first_vignettes(7)]
    assert np.allclose(few.log_probs, more.log_probs[at], atol=2e-4)
    assert few.coherence == more.coherence == 1.0
    assert np.allclose(few.prior, few.log_probs.mean(0, keepdims=True), atol=1e-9)


def test_no_scene_uses_a_word_of_an_option():
    # A stem is six letters; "against" is a preposition that no foundation owns.
    texts = [text for entry in probe_data()["completion"] for text in entry["options"]]
    options = set().union(*map(words, [*texts, *probe_data()["digits"]["options"]]))
    stems = {word[:6] for word in options if len(word) > 4} - {"agains"}
    scenes = set().union(*(words(v.text) for v in ALL))
    assert len(stems) > 25
    assert {word for word in scenes if word[:6] in stems} == set()
    assert all(len(e["options"]) == len(FOUNDATIONS) for e in probe_data()["completion"])


@pytest.mark.parametrize("name", ["gemma", "llama"])
def test_option_scores_equal_those_of_single_unpadded_rows(name, request):
    model = request.getfixturevalue(name)
    found = evaluate(model, config=EvalConfig(batch_size=3))
    assert (found.style, found.log_probs.shape) == ("completion", (8, 3, 7))
    for item, stem, option in ((0, 0, 0), (1, 1, 3), (4, 2, 6), (7, 0, 2), (5, 1, 5), (3, 2, 1)):
        question = probe_data()["completion"][stem]
        context = FEW[item].text + question["stem"]
        expected = log_p_of(model, context, question["options"][option])
        assert found.log_probs[item, stem, option] == pytest.approx(expected, abs=2e-4)
    one_by_one = evaluate(model, config=EvalConfig(batch_size=1))
    assert np.allclose(one_by_one.log_probs, found.log_probs, atol=2e-4)


def test_persona_precedes_the_scene(gemma):
    found = evaluate(gemma, persona="You are calm.")
    question = probe_data()["completion"][1]
    context = f"You are calm.\n\n{FEW[2].text}{question['stem']}"
    expected = log_p_of(gemma, context, question["options"][4])
    assert found.log_probs[2, 1, 4] == pytest.approx(expected, abs=2e-4)
    assert found.nats != evaluate(gemma).nats


def test_scores_are_calibrated_by_the_mean_of_base(gemma):
    base = evaluate(gemma)
    assert base.coherence == 1.0
    # Minus the mean over items, then the mean over stems, then a softmax over options.
    raw = base.log_probs - base.log_probs.mean(0)
    mean = raw.mean(1)
    expected = mean - np.log(np.exp(mean).sum(1, keepdims=True))
    assert np.allclose(base.log_p, expected, atol=1e-9)
    assert np.allclose(np.exp(base.log_p).sum(1), 1.0)
    assert np.abs(base.log_p - np.log(1 / 7)).max() > 0.01
    # Another evaluation is calibrated by base's mean, not by its own.
    with steering().steering(gemma):
        steered = evaluate(gemma)
    assert np.allclose(steered.prior, base.log_probs.mean(0), atol=1e-9)
    assert np.abs((steered.log_probs - steered.prior).mean(0)).max() > 0.1


def test_steering_changes_the_scores_but_not_those_of_base(gemma):
    with baked(gemma, [random_adapter(gemma)]), steering().steering(gemma):
        steered = evaluate(gemma)  # the first call, with this package's hooks on
    base = evaluate(gemma)
    assert base.coherence == 1.0
    assert np.array_equal(steered.base_mass, base.base_mass)
    assert np.array_equal(steered.prior, base.prior)
    assert steered.nats != base.nats
    assert steered.coherence == pytest.approx(
        np.exp(np.mean(np.log(steered.mass / base.mass))), rel=1e-9
    )
    assert abs(steered.coherence - 1) > 0.01


def test_digits_score_the_same_option_in_both_orders(chat):
    found = evaluate(chat, persona="Be kind.", config=EvalConfig(batch_size=3))
    assert found.style == "digits"
    data = probe_data()["digits"]
    for item, order, option in ((0, 0, 0), (0, 1, 0), (3, 0, 5), (6, 1, 5), (7, 1, 2)):
        listed = data["options"] if order == 0 else data["options"][::-1]
        lines = "\n".join(f"{k + 1}. {text}" for k, text in enumerate(listed))
        question = data["question"].format(vignette=FEW[item].text, options=lines)
        text = f"<system>Be kind.\n<user>{question}\n<a>{data['answer']}"
        digit = str(1 + listed.index(data["options"][option]))
        expected = log_p_of(chat, text, digit, bos=False)
        assert found.log_probs[item, order, option] == pytest.approx(expected, abs=2e-4)
    assert np.array_equal(found.prior, np.zeros((1, 1, 1)))  # the two orders are the calibration
    assert evaluate(chat, config=EvalConfig(batch_size=3)).coherence == 1.0


def test_base_is_measured_without_hooks_and_again_for_other_weights(gemma):
    halve = [("blocks.1.hook_resid_post", lambda h, hook: 0.5 * h)]
    expected = evaluate(tiny_gemma())
    with gemma.hooks(fwd_hooks=halve):
        first = evaluate(gemma)  # the first call, with a hook of the caller on
    assert first.coherence != 1.0
    assert np.array_equal(evaluate(gemma).log_probs, expected.log_probs)
    assert evaluate(gemma).coherence == 1.0
    gemma.blocks[1].mlp.W_out.data.mul_(0.5)  # torch's version counter does not count this
    edited = evaluate(gemma)
    assert edited.coherence == 1.0
    assert not np.array_equal(edited.log_probs, expected.log_probs)
