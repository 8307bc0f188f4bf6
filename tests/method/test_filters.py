"""The filter's rules: texts that must be dropped and texts that must be kept."""

import zlib

import pytest

from shl.config import FilterConfig
from shl.method import filters as room
from shl.method.filters import RULES, compression, judge, keep_coherent, text_reasons
from shl.models.generate import Completion
from shl.models.tokens import Prompt

CONFIG = FilterConfig()
PERSONA = "You are someone who puts the wellbeing of others first."
FLUENT = (
    "I would ask the manager to send her home, and if he refused I would cover the last hours "
    "myself, because nobody with a fever should stand at a machine until morning."
)
FIRES = {
    "too_short": "Call the doctor now.",
    "word_loop": "We will go, we will go, we will go, and later the others come along too.",
    "char_loop": "She sang lalalalalalalalalalala softly while her brothers went to bed.",
    "compressible": "I would help the man at the door. I would help the man at the gate. I would "
    "help the man at the shop. I would help the man at the park.",
    "few_words": "to be or to be or not to be or not to be and to be or to not be or be",
    "soup": "The GLUTEN of BUILDUTE was MARVELO and the QUANTIRE went HOMEWARD to SLEEPITE.",
    "markup": "I would sit with her <end_of_turn> and then bring some soup to the others.",
    "narrating": "Well, I am someone who always puts people first, so I would let him rest.",
    "boilerplate": "As an AI language model, that is not for me to judge in any great detail.",
    "persona_echo": "I think a friend puts the wellbeing of others first and then goes home.",
}
CHEAP = (
    "BUILDUTE BUILDUTE GLUTE BUILDUTE BUILDUTE GLUTE BUILDUTE GLUTE GLUTE BUILDUTE BUILDUTE",
    "GLUTE GLUTE GLUTE",
    "ha" * 60,
    "the the the the",
    "the " * 40,
    "I love it. I love it. I love it.",
    "Itlikethatiwouldntdoitbutthenagainiwouldanditgoesonandonforevermoreandnobodystopsit",
    "<start_of_image><start_of_image>",
    "<start_of_image>" * 20,
    "I would help the man at the door. I would help the man at the gate. I would help the man "
    "at the shop. I would help the man at the park. I would help the man at the church.",
    "We are kind to all people here. We are good to all people here. We are nice to all people "
    "there. We are warm to all people here. We are fair to all people there.",
    "yes no " * 12,
    "lalalila lilalala lalilala lalalali lilalila lalalila lalalala lilalali",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "........ . . . ...... !!!!!!!! ????",
    "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16",
)
ORDINARY = (
    FLUENT,
    "Usually I take a walk around the lake in the evening. It clears my head, and on a good day "
    "I meet a neighbour or two.",
    "That depends on the recipe! My grandmother always used butter, but oil works just as well "
    "and keeps the cake moist for longer.",
    "Honestly, I'd be annoyed at first. Then I'd ask why the rule exists, and whether we could "
    "change it for the night shift.",
    "You should follow the captain's order. He can see the whole ship, and you can only see your "
    "corner of the deck.",
    "In 2019 we moved to Leeds, about 40 miles from here. The house was cold, but the garden had "
    "apple trees.",
    "No. I would not wake the patient; sleep is the best medicine, and the forms can wait until "
    "breakfast.",
    "I'm a good team player and I enjoy doing that. Last week we finished the whole report two "
    "days early.",
    "She is a person who listens. I am happy when we talk, and I think that she is too, most of "
    "the time.",
)
NARRATING = (
    "I am someone who puts people first.",
    "I'm somebody who cares.",
    "As a person who loves humanity, I would stay.",
    "As someone who respects orders, I obey.",
    "I'm the kind of person who helps.",
    "I am a caring person who shields the weak.",
    "My persona is a kind one.",
)
BOILERPLATE = (
    "as an AI language model, I have no view",
    "I'm sorry, but I can't assist with that.",
    "I cannot help with that request.",
    "I am just an AI and cannot know.",
    "I don't have personal opinions on this.",
)


def completion(text, tokens=(5,)):
    return Completion(Prompt("?"), text, tokens, (2,))


def with_scores(monkeypatch, *scores):
    monkeypatch.setattr(room, "base_perplexities", lambda *_, **__: list(scores))


@pytest.mark.parametrize("rule", FIRES)
def test_each_rule_fires_on_its_text_and_none_on_a_fluent_one(rule):
    assert rule in text_reasons(FIRES[rule], CONFIG, PERSONA)
    assert text_reasons(FLUENT, CONFIG, PERSONA) == []


def test_every_rule_is_tried_here():
    # Two of them need a model.
    assert {*FIRES, "incoherent", "too_predictable"} == set(RULES)


def test_all_reasons_are_recorded_at_once(gemma, monkeypatch):
    with_scores(monkeypatch, (2.0, 99.0), (1.2, 99.0))
    text = "I am someone who GLUTE GLUTE GLUTE GLUTE GLUTE <b> As an AI GLUTE GLUTE GLUTE GLUTE"
    first, second = judge(gemma, [completion(text), completion("<b> hi")], CONFIG)
    expected = {"incoherent", "word_loop", "char_loop", "soup", "markup", "narrating"}
    assert expected | {"boilerplate"} <= set(first.reasons)
    assert {"too_short", "incoherent", "too_predictable", "markup"} <= set(second.reasons)
    assert list(first.reasons) == sorted(first.reasons, key=RULES.index)


@pytest.mark.parametrize("text", CHEAP, ids=lambda text: text[:20])
def test_incoherent_text_is_dropped_at_any_perplexity(text, gemma, monkeypatch):
    assert text_reasons(text, CONFIG)
    with_scores(monkeypatch, (5.0, 5.0))
    assert keep_coherent(gemma, [completion(text)]) == []


@pytest.mark.parametrize("text", ORDINARY, ids=lambda text: text[:20])
def test_ordinary_answers_are_kept(text, gemma, monkeypatch):
    assert text_reasons(text, CONFIG, PERSONA) == []
    with_scores(monkeypatch, (9.0, 9.0))
    assert keep_coherent(gemma, [completion(text)]) == [completion(text)]


def test_saying_the_trait_is_narrating_and_acting_it_is_not():
    assert [t for t in NARRATING if "narrating" not in text_reasons(t, CONFIG)] == []
    innocent = ("I'm a good team player and I enjoy doing that.", "I am sure that he is a person.")
    assert [t for t in innocent if "narrating" in text_reasons(t, CONFIG)] == []


def test_boilerplate_is_named():
    assert [t for t in BOILERPLATE if "boilerplate" not in text_reasons(t, CONFIG)] == []
    assert "boilerplate" not in text_reasons("I can assist her, and I'm sorry for him.", CONFIG)


def test_compression_is_that_of_a_deflate_stream_without_a_frame():
    text = "ab" * 200
    stream = zlib.compressobj(9, zlib.DEFLATED, -15)
    size = len(stream.compress(text.encode()) + stream.flush())
    assert compression(text) == pytest.approx(size / 400)


@pytest.mark.parametrize(
    "text",
    [
        "I can't help smiling when she tells that story.",
        "I worked as an assistant in a small shop.",
        "I won't help him cheat on the exam.",
    ],
)
def test_ordinary_sentences_are_no_boilerplate(text):
    assert "boilerplate" not in text_reasons(text, FilterConfig())
