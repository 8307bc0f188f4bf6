"""Base perplexities and the filter's arithmetic by hand, and every option at its boundary."""

import zlib
from dataclasses import fields

import pytest
import torch
from helpers import random_adapter

from shl.config import FilterConfig
from shl.hooks.bake import baked
from shl.hooks.vector import SteeringVector
from shl.method import filters as room
from shl.method.filters import compression, judge, longest_run, looks_real, ngram_share, words_of
from shl.models.generate import Completion, generate
from shl.models.scores import base_perplexities
from shl.models.tokens import Prompt, encode, encode_text

FLUENT = (
    "I would ask the manager to send her home, and if he refused I would cover the last hours "
    "myself, because nobody with a fever should stand at a machine until morning."
)


def completion(text, tokens=(5,)):
    return Completion(Prompt("?"), text, tokens, (2,))


def with_scores(monkeypatch, *scores):
    monkeypatch.setattr(room, "base_perplexities", lambda *_, **__: list(scores))


def test_shares_runs_and_words_by_hand():
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


def test_compression_is_the_raw_deflate_stream_over_the_text_within_its_frame():
    for text in (FLUENT, "ab" * 200):
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
        size = len(deflate.compress(text.encode()) + deflate.flush())
        assert compression(text) * len(text) == pytest.approx(size, abs=2)
    assert compression("ab" * 200) < 0.05 < 0.5 < compression(FLUENT)


def test_base_perplexities_are_those_of_full_logits_on_single_rows(gemma):
    texts = generate(gemma, ["Hello there?", "A?", "What is it now?"], max_new_tokens=21, seed=4)
    texts.append(Completion(Prompt("A?"), "abc", tuple(encode_text(gemma, "abc")), (2, 9)))
    expected = []
    for c in texts:
        row = torch.tensor([[*c.prompt_tokens, *c.tokens]])
        log_p = gemma(row)[0].double().log_softmax(-1)
        n = len(c.prompt_tokens)
        losses = torch.tensor([-log_p[n + i - 1, t] for i, t in enumerate(c.tokens)])
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


def test_an_empty_completion_is_too_short_and_infinitely_perplexing(gemma):
    empty = Completion(Prompt("A?"), "", (), tuple(encode(gemma, "A?")))
    (verdict,) = judge(gemma, [empty])
    assert (verdict.perplexity, verdict.tail_perplexity) == (float("inf"), float("inf"))
    assert {"too_short", "incoherent"} <= set(verdict.reasons)


def test_perplexity_bounds_move_the_verdict(gemma, monkeypatch):
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
def test_each_option_moves_the_verdict_as_its_docstring_says(option, gemma, monkeypatch):
    given, keeps, drops, rule = OPTIONS[option]
    with_scores(monkeypatch, (9.0, 9.0) if isinstance(given, str) else given)
    text = completion(given if isinstance(given, str) else FLUENT)
    for value, fires in ((keeps, False), (drops, True)):
        (verdict,) = judge(gemma, [text], FilterConfig(**{option: value}))
        assert (rule in verdict.reasons) == fires


def test_every_option_is_tried_here():
    assert {*OPTIONS, "batch_size"} == {field.name for field in fields(FilterConfig)}
