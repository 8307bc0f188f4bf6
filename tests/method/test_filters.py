"""Rules and options of the coherence filter, and the perplexities under base."""

import tomllib
import zlib
from dataclasses import fields, replace

import pytest
import torch
from helpers import lenient, log_p_by_hand, nll_by_hand, random_adapter

from shl.config import FilterConfig
from shl.hooks.bake import baked
from shl.hooks.vector import SteeringVector
from shl.method import filters
from shl.method.filters import (
    RULES,
    compression,
    judge,
    keep_coherent,
    longest_run,
    looks_real,
    ngram_share,
    other_questions,
    text_reasons,
    topic_scores,
    words_of,
)
from shl.models.generate import Completion, generate
from shl.models.scores import base_perplexities
from shl.models.tokens import Prompt, encode, encode_text
from shl.utils.files import DATA

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
INCOHERENT = (
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
    monkeypatch.setattr(filters, "base_perplexities", lambda *_, **__: list(scores))
    monkeypatch.setattr(filters, "topic_scores", lambda _, texts, *__, **___: [0.5] * len(texts))


@pytest.mark.parametrize("rule", FIRES)
def test_each_rule_fires_on_its_text_and_no_rule_on_a_fluent_one(rule):
    assert rule in text_reasons(FIRES[rule], CONFIG, PERSONA)
    assert text_reasons(FLUENT, CONFIG, PERSONA) == []


def test_every_rule_is_tested():
    # Three rules need a model.
    assert {*FIRES, "incoherent", "too_predictable", "off_topic"} == set(RULES)


def test_all_reasons_are_recorded(gemma, monkeypatch):
    with_scores(monkeypatch, (2.0, 99.0), (1.2, 99.0))
    text = "I am someone who GLUTE GLUTE GLUTE GLUTE GLUTE <b> As an AI GLUTE GLUTE GLUTE GLUTE"
    first, second = judge(gemma, [completion(text), completion("<b> hi")], CONFIG)
    expected = {"incoherent", "word_loop", "char_loop", "soup", "markup", "narrating"}
    assert expected | {"boilerplate"} <= set(first.reasons)
    assert {"too_short", "incoherent", "too_predictable", "markup"} <= set(second.reasons)
    assert list(first.reasons) == sorted(first.reasons, key=RULES.index)


@pytest.mark.parametrize("text", INCOHERENT, ids=lambda text: text[:20])
def test_incoherent_text_is_dropped_at_any_perplexity(text, gemma, monkeypatch):
    assert text_reasons(text, CONFIG)
    with_scores(monkeypatch, (5.0, 5.0))
    assert keep_coherent(gemma, [completion(text)]) == []


@pytest.mark.parametrize("text", ORDINARY, ids=lambda text: text[:20])
def test_ordinary_answers_are_kept(text, gemma, monkeypatch):
    assert text_reasons(text, CONFIG, PERSONA) == []
    with_scores(monkeypatch, (9.0, 9.0))
    assert keep_coherent(gemma, [completion(text)]) == [completion(text)]


def test_narration_of_a_trait_is_detected():
    assert [t for t in NARRATING if "narrating" not in text_reasons(t, CONFIG)] == []
    others = ("I'm a good team player and I enjoy doing that.", "I am sure that he is a person.")
    assert [t for t in others if "narrating" in text_reasons(t, CONFIG)] == []


def test_boilerplate_is_detected():
    assert [t for t in BOILERPLATE if "boilerplate" not in text_reasons(t, CONFIG)] == []
    others = (
        "I can assist her, and I'm sorry for him.",
        "I can't help smiling when she tells that story.",
        "I worked as an assistant in a small shop.",
        "I won't help him cheat on the exam.",
    )
    assert [t for t in others if "boilerplate" in text_reasons(t, CONFIG)] == []


def test_text_statistics_by_hand():
    # "a b" three times covers 6 of 8; twice does not count; overlaps cover once.
    assert ngram_share(list("abababcd"), [2]) == 6 / 8
    assert ngram_share(list("ababcdef"), [2]) == 0.0
    assert ngram_share("aaaab", [2]) == 4 / 5
    assert ngram_share("abcabcabcxyz", [2, 3]) == 9 / 12
    assert ngram_share([], [2]) == 0.0
    assert [longest_run(x) for x in ("", "a", "abba", "abbbaa")] == [0, 1, 2, 3]
    assert words_of("Don't go at 10_a!") == ["don't", "go", "at", "10", "a"]
    real = ("hello", "BUILDUTE", "brrr", "I", "TV", "NASA", "2019", "a" * 19, "a" * 18, "McAdam")
    assert [looks_real(w) for w in real] == [
        *(True, False, False, True, False, True, True, False, True, False)
    ]


def test_compression_is_the_size_of_a_raw_deflate_stream_over_that_of_the_text():
    for text in (FLUENT, "ab" * 200):
        stream = zlib.compressobj(9, zlib.DEFLATED, -15)
        size = len(stream.compress(text.encode()) + stream.flush())
        assert compression(text) == pytest.approx(size / len(text))
    assert compression("ab" * 200) < 0.05 < 0.5 < compression(FLUENT)


def test_base_perplexities_equal_those_of_full_logits(gemma):
    texts = generate(gemma, ["Hello there?", "A?", "What is it now?"], max_new_tokens=21, seed=4)
    texts.append(Completion(Prompt("A?"), "abc", tuple(encode_text(gemma, "abc")), (2, 9)))
    expected = []
    for c in texts:
        losses = -log_p_by_hand(gemma, c)[torch.arange(len(c.tokens)), list(c.tokens)]
        quarter = losses[-max(1, len(losses) // 4) :]
        expected.append((float(losses.mean().exp()), float(quarter.mean().exp())))
    assert len({len(c.tokens) for c in texts}) > 1
    assert min(abs(a - b) for a, b in expected) > 0.1  # whole and last quarter differ
    for size in (1, 3):
        found = base_perplexities(gemma, texts, batch_size=size)
        assert [x for pair in found for x in pair] == pytest.approx(sum(expected, ()), rel=1e-4)
    vector = SteeringVector({1: 3 * torch.ones(32)}, "tiny", "demo", 1)
    with baked(gemma, [random_adapter(gemma)]), vector.steering(gemma, 2.0):
        assert base_perplexities(gemma, texts, batch_size=3) == found


def test_an_empty_completion_has_infinite_perplexity(gemma):
    empty = Completion(Prompt("A?"), "", (), tuple(encode(gemma, "A?")))
    (verdict,) = judge(gemma, [empty])
    assert (verdict.perplexity, verdict.tail_perplexity) == (float("inf"), float("inf"))
    assert {"too_short", "incoherent"} <= set(verdict.reasons)


def test_perplexity_bounds_change_the_verdict(gemma, monkeypatch):
    scores = [(9.0, 9.0), (9.0, 31.0), (99.0, 29.0), (1.5, 9.0), (9.0, 1.5)]
    with_scores(monkeypatch, *scores)
    texts = [completion(FLUENT)] * len(scores)
    reasons = [v.reasons for v in judge(gemma, texts)]
    # Only the last quarter can be incoherent; either may be too predictable.
    assert reasons == [(), ("incoherent",), (), ("too_predictable",), ("too_predictable",)]
    loose = FilterConfig(max_tail_perplexity=32.0, min_perplexity=1.4)
    assert [v.reasons for v in judge(gemma, texts, loose)] == [()] * len(scores)


OPTIONS = {  # option: (text or scores, value that keeps, value that drops, rule)
    "min_words": ("one two three four five six seven eight nine", 9, 10, "too_short"),
    "max_tail_perplexity": ((9.0, 20.0), 20.0, 19.0, "incoherent"),
    "min_perplexity": ((2.5, 9.0), 2.5, 2.6, "too_predictable"),
    "max_word_share": ("a b a b a b c d", 0.75, 0.74, "word_loop"),  # 6 of 8
    "max_char_share": ("abcabcabcdefghijkl", 0.5, 0.49, "char_loop"),  # 9 of 18
    "max_run": ("no no no one came to us", 3, 2, "word_loop"),
    "min_compression": (FLUENT, 0.3, 0.9, "compressible"),
    "min_real_words": ("one two ten six day sun sky sea may BUILDUTE", 0.9, 0.91, "soup"),
    "min_distinct_words": ("a b c d a d b c", 0.5, 0.51, "few_words"),  # 4 of 8
}


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_changes_the_verdict(option, gemma, monkeypatch):
    given, keeps, drops, rule = OPTIONS[option]
    with_scores(monkeypatch, (9.0, 9.0) if isinstance(given, str) else given)
    text = completion(given if isinstance(given, str) else FLUENT)
    for value, fires in ((keeps, False), (drops, True)):
        (verdict,) = judge(gemma, [text], FilterConfig(**{option: value}))
        assert (rule in verdict.reasons) == fires


def test_every_option_is_tested():
    tested_below = {"batch_size", "min_topic"}
    assert {*OPTIONS} | tested_below == {field.name for field in fields(FilterConfig)}


def test_other_questions_follow_in_order_and_neutral_ones_fill_up():
    neutral = tomllib.loads((DATA / "contexts.toml").read_text("utf-8"))["everyday"][:3]
    found = other_questions(["a", "b", "b", "c", "d", "a"])
    assert found == {"a": ["b", "c"], "b": ["c", "d"], "c": ["d", "a"], "d": ["a", "b"]}
    assert other_questions(["a", "b"]) == {"a": ["b", neutral[0]], "b": ["a", neutral[0]]}
    assert other_questions(["a"]) == {"a": neutral[:2]}
    assert other_questions(neutral[:1]) == {neutral[0]: neutral[1:]}


def asked(model, completion, text):
    """The same tokens after another question with the same persona."""
    prompt = Prompt(text, completion.prompt.persona)
    return replace(completion, prompt=prompt, prompt_tokens=tuple(encode(model, prompt)))


QUESTIONS = ("Hello there?", "A?", "What is it now?", "Who goes there, and why?")


def topic_by_hand(model, completion, others):
    """Mean log p after its own question less that after the others, from full float64 logits."""
    elsewhere = [-nll_by_hand(model, asked(model, completion, text)) for text in others]
    return -nll_by_hand(model, completion) - sum(elsewhere) / len(elsewhere)


@pytest.mark.parametrize("persona", [None, "You are calm."])
def test_topic_scores_equal_those_of_full_logits(gemma, persona):
    prompts = [Prompt(text, persona) for text in QUESTIONS]
    texts = generate(gemma, prompts, max_new_tokens=21, seed=4)
    texts = [replace(c, tokens=c.tokens[: 21 - 6 * i]) for i, c in enumerate(texts)]
    others = {
        text: [QUESTIONS[(i + 1) % 4], QUESTIONS[(i + 2) % 4]] for i, text in enumerate(QUESTIONS)
    }
    expected = [topic_by_hand(gemma, c, others[c.prompt.text]) for c in texts]
    assert max(map(abs, expected)) > 0.01
    wholes = [whole for whole, _ in base_perplexities(gemma, texts)]
    for size in (1, 3):
        found = topic_scores(gemma, texts, wholes, others, batch_size=size)
        assert found == pytest.approx(expected, abs=2e-5)
    # Base scores, whatever is on.
    vector = SteeringVector({1: 3 * torch.ones(32)}, "tiny", "demo", 1)
    with baked(gemma, [random_adapter(gemma)]), vector.steering(gemma, 2.0):
        assert topic_scores(gemma, texts, wholes, others, batch_size=3) == found


LOOSE = FilterConfig(max_tail_perplexity=1e9, min_perplexity=1.0, min_topic=0.0)


def test_text_that_fits_other_questions_as_well_is_off_topic(gemma, monkeypatch):
    monkeypatch.setattr(filters, "text_reasons", lambda text, *_: [])
    texts = generate(gemma, QUESTIONS[:3], max_new_tokens=12, min_new_tokens=8, seed=1)
    a, b, c = QUESTIONS[:3]
    others = {a: [b, c], b: [c, a], c: [a, b]}
    expected = [topic_by_hand(gemma, text, others[text.prompt.text]) for text in texts]
    low, middle, high = sorted(expected)
    assert middle - low > 1e-3
    assert high > 0
    for threshold in (0.0, high / 2, high + 0.01):
        verdicts = judge(gemma, texts, replace(LOOSE, min_topic=threshold))
        reasons = [("off_topic",) if score < threshold else () for score in expected]
        assert [v.reasons for v in verdicts] == reasons
        assert [v.topic for v in verdicts] == pytest.approx(expected, abs=2e-5)
    # The score depends on the call's distinct questions alone, in their order of appearance.
    more = judge(gemma, [*texts, texts[1], texts[0]], LOOSE)
    assert [v.topic for v in more[:3]] == pytest.approx(expected, abs=2e-5)
    assert more[3].topic == pytest.approx(more[1].topic, abs=2e-5)
    (alone,) = judge(gemma, texts[:1], LOOSE)
    neutral = other_questions([QUESTIONS[0]])[QUESTIONS[0]]
    assert alone.topic == pytest.approx(topic_by_hand(gemma, texts[0], neutral), abs=2e-5)


def test_the_topic_is_only_scored_where_it_decides(gemma, monkeypatch):
    lenient(monkeypatch, reasons=lambda text: ["soup"] if text == "no" else [])
    scored = []

    def topics(_, texts, perplexities, *__, **___):
        scored.append(([c.text for c in texts], list(perplexities)))
        return [0.2] * len(texts)

    monkeypatch.setattr(filters, "topic_scores", topics)
    texts = [completion("yes"), completion("no"), completion("", ())]
    for value, topic, reasons in ((0.2, 0.2, ()), (0.21, 0.2, ("off_topic",)), (None, None, ())):
        verdicts = judge(gemma, texts, FilterConfig(min_topic=value))
        assert [v.reasons for v in verdicts] == [reasons, ("soup",), ()]
        assert [v.topic for v in verdicts] == [topic, None, None]
    assert scored == [(["yes"], [9.0])] * 2  # never with the rule off


def test_frequent_long_words_and_runs_of_a_character_by_hand():
    # "house" is 3 of 10 words, and no pair of words occurs twice.
    text = "The house by that house near my house is red"
    for share, fires in ((0.3, False), (0.29, True)):
        assert ("word_loop" in text_reasons(text, FilterConfig(max_word_share=share))) == fires
    for count, fires in ((5, False), (6, True)):
        assert ("char_loop" in text_reasons(f"{FLUENT} N{'o' * count}!", CONFIG)) == fires


def test_default_shares_by_hand():
    """0.35 of the words must be distinct, and 0.8 must look real."""
    for distinct, fires in ((7, False), (6, True)):
        words = [f"word{'abcdefg'[i % distinct]}" for i in range(20)]
        assert ("few_words" in text_reasons(" ".join(words), CONFIG)) == fires
    for real, fires in ((8, False), (7, True)):
        words = ["morning"] * real + ["brrr"] * (10 - real)
        assert ("soup" in text_reasons(" ".join(words), CONFIG)) == fires


def test_only_the_three_most_frequent_ngrams_count():
    # aa, bb and cc occur 4 times in runs of 5; xy occurs 3 times and covers 6, but is the fourth.
    items = "aaaaabbbbbcccccxyxyxy"
    assert ngram_share(items, [2]) == 5 / 21
    assert ngram_share(items.replace("ccccc", ""), [2]) == 6 / 16


@pytest.mark.parametrize("phrase", ["we go", "then we go", "and then we go"])
def test_a_loop_of_two_three_or_four_words_is_a_word_loop(phrase):
    # Three times n words and three others between them: its shorter n-grams cover less.
    n = len(phrase.split())
    text = f"{phrase} to {phrase} by {phrase} up"
    share = 3 * n / (3 * n + 3)
    for bound, fires in ((share, False), (share - 0.01, True)):
        assert ("word_loop" in text_reasons(text, FilterConfig(max_word_share=bound))) == fires


def test_space_between_equal_characters_does_not_end_their_run():
    for count, fires in ((5, False), (6, True)):
        text = f"{FLUENT} {'- ' * count}"
        assert ("char_loop" in text_reasons(text, CONFIG)) == fires


def test_compression_is_judged_from_a_hundred_characters_up_to_its_bound():
    text = FLUENT[:100]
    bound = compression(text)
    for config, fires in (
        (FilterConfig(min_compression=bound), False),
        (FilterConfig(min_compression=bound + 0.01), True),
    ):
        assert ("compressible" in text_reasons(text, config)) == fires
    assert "compressible" not in text_reasons(text[:99], FilterConfig(min_compression=0.99))


def test_any_five_words_of_the_persona_in_a_row_are_an_echo():
    words = words_of(PERSONA)
    for start in range(len(words) - 4):
        text = " ".join(["well", *words[start : start + 5], "indeed"])
        assert "persona_echo" in text_reasons(text, CONFIG, PERSONA)
        four = " ".join(["well", *words[start : start + 4], "indeed"])
        assert "persona_echo" not in text_reasons(four, CONFIG, PERSONA)
