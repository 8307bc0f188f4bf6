"""Backtracking generation: thresholds that never or always fire, rows on their own, replay."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from helpers import hook_count, log_p_by_hand, one_sentence
from hypothesis import given, settings
from hypothesis import strategies as st

from shl.config import FilterConfig, GenerateConfig
from shl.hooks.handle import suspended
from shl.hooks.vector import SteeringVector
from shl.method.backtrack import FEW_WORDS, Backtrack, dose_table, replay
from shl.models.generate import Completion, generate, sample
from shl.models.scores import base_perplexities, token_nll
from shl.models.tiny import tiny_gemma
from shl.models.tokens import Prompt
from shl.utils.errors import ShlError
from shl.utils.seeds import generator_for

PROMPTS = ["Tell me about your long and quiet day?", "Hi?", "Why is that so?", "A b?", "What now?"]
V = SteeringVector(
    {1: 2 * torch.randn(32, generator=torch.Generator().manual_seed(0))}, "tiny", "demo", 1
)
GREEDY = {"temperature": 0.0, "max_new_tokens": 45}
EOS = 1


@dataclass(frozen=True)
class ByNll(Backtrack):
    """Only the mean NLL of a window counts: random characters look like loops."""

    limit: float = 1e9

    def reasons(self, text, nll, top):
        last = nll[-self.window :]
        return ("incoherent",) if sum(last) / len(last) > self.limit else ()


@dataclass(frozen=True)
class ByLength(Backtrack):
    """A window goes wrong if it ends after more tokens than `most`, at most `times` times."""

    most: int = 0
    times: int = 99
    seen: list = ()

    def reasons(self, text, nll, top):
        wrong = len(nll) > self.most and sum(self.seen) < self.times
        self.seen.append(wrong)
        return ("incoherent",) if wrong else ()


def steered(model, backtrack=None, dose=1.0, prompts=PROMPTS, options=None, **changes):
    with V.steering(model, dose, **(options or {})):
        return generate(model, prompts, **GREEDY | changes, backtrack=backtrack)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_thresholds_that_never_fire_change_nothing(model, temperature):
    found = steered(model, ByNll(), temperature=temperature)
    assert found == steered(model, temperature=temperature)
    assert all(c.doses == c.rewinds == () for c in found)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_threshold_that_always_fires_leaves_the_clean_prefix(model, temperature):
    always = Backtrack(filter=FilterConfig(max_tail_perplexity=1.0, min_perplexity=1.0))
    for c in steered(model, always, temperature=temperature):
        assert (c.tokens, c.text, c.doses, c.ended) == ((), "", (), False)
        assert [kept for kept, _ in c.rewinds] == [0, 0, 0]
        assert [dose for _, dose in c.rewinds] == pytest.approx([0.6, 0.36, 0.216])


def test_clean_windows_are_kept_and_a_second_failure_goes_one_window_further_back(gemma):
    [plain] = steered(gemma, prompts=PROMPTS[:1])
    [c] = steered(gemma, ByLength(most=16, seen=[]), prompts=PROMPTS[:1])
    # Wrong at 24, at 24 again, clean at 16, wrong at 24, and once more: cut.
    assert [kept for kept, _ in c.rewinds] == [16, 8, 16]
    assert len(c.tokens) == len(c.doses) == 16
    assert c.tokens[:8] == plain.tokens[:8]
    assert c.doses == pytest.approx([1.0] * 8 + [0.36] * 8)
    [c] = steered(gemma, ByLength(most=16, max_rewinds=0, seen=[]), prompts=PROMPTS[:1])
    assert (c.tokens, c.doses, c.rewinds) == (plain.tokens[:16], (), ())


def test_the_dose_falls_at_a_rewind_and_rises_up_to_where_it_began(gemma):
    once = ByLength(most=12, times=1, recover_after=8, seen=[])
    for start in (1.0, -2.0):
        once.seen.clear()
        [c] = steered(gemma, once, dose=start, prompts=PROMPTS[:1])
        shares = [1.0] * 8 + [0.6] * 8 + [0.75] * 8 + [0.9375] * 8 + [1.0] * 13
        assert c.doses == pytest.approx([start * share for share in shares])
        assert c.rewinds == ((8, pytest.approx(0.6 * start)),)
        assert c.dose == start
    slow = replace(once, recover_after=16, recover_by=1.0, seen=[])
    [c] = steered(gemma, slow, prompts=PROMPTS[:1])
    assert c.doses == pytest.approx([1.0] * 8 + [0.6] * 37)
    late = replace(once, recover_after=9, seen=[])  # two windows of 8
    [c] = steered(gemma, late, prompts=PROMPTS[:1])
    assert c.doses == pytest.approx([1.0] * 8 + [0.6] * 16 + [0.75] * 16 + [0.9375] * 5)


@pytest.mark.parametrize(("dose", "limit"), [(1.0, 3.6), (-1.5, 3.2), (-1.5, 3.7)])
def test_rows_rewind_on_their_own_and_replay_to_the_token(model, dose, limit):
    backtrack, new = ByNll(limit=limit, recover_after=8), {"max_new_tokens": 29}
    batched = steered(model, backtrack, dose, **new)
    assert batched == [steered(model, backtrack, dose, [p], **new)[0] for p in PROMPTS]
    assert batched == steered(model, backtrack, dose, batch_size=2, **new)
    rewound = [c for c in batched if c.rewinds]
    assert rewound
    for c in batched:
        assert replay(model, c, V).argmax(1).tolist() == list(c.tokens)
        assert len(c.doses) == (len(c.tokens) if c.rewinds else 0)
    plain = steered(model, dose=dose, **new)
    for c, other in zip(batched, plain, strict=True):
        assert c.rewinds or c == other


def test_watched_completions_know_their_nll_under_base(model):
    found = steered(model, ByNll(limit=3.6), temperature=1.0)
    assert any(c.rewinds for c in found)
    with suspended(model):
        expected = token_nll(model, found)
    for c, losses in zip(found, expected, strict=True):
        assert c.base_nll == pytest.approx(losses.tolist(), abs=1e-4)
    scores = base_perplexities(model, found)
    for score, reused in zip(scores, base_perplexities(model, found, reuse_nll=True), strict=True):
        assert reused == pytest.approx(score, rel=1e-4)
    # Only where it is asked for, and where a completion has them: mean 2, and 3 in the last one.
    told = [replace(found[0], tokens=(7,) * 4, base_nll=(1.0, 2.0, 2.0, 3.0)), found[1]]
    reused = base_perplexities(model, told, reuse_nll=True)
    assert reused[0] == pytest.approx((math.exp(2), math.exp(3)))
    assert base_perplexities(model, told)[0] != pytest.approx(reused[0])
    plain = steered(model, temperature=1.0)
    assert all(c.base_nll == () for c in plain)
    assert base_perplexities(model, plain, reuse_nll=True) == base_perplexities(model, plain)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_completions_of_base_know_their_nll(model, monkeypatch, temperature):
    options = {"max_new_tokens": 9, "temperature": temperature, "min_new_tokens": 4, "top_k": 5}
    # A turn that ends with one of these has a logit for its end as well, which is not counted.
    ends = frozenset(range(0, model.cfg.d_vocab, 5))
    monkeypatch.setattr("shl.models.generate.end_ids", lambda _: ends)
    found = generate(model, PROMPTS, **options)
    expected = token_nll(model, found)
    assert {c.ended for c in found} >= {True}
    assert all(len(c.tokens) > 3 for c in found)
    for c, losses in zip(found, expected, strict=True):
        assert c.base_nll == pytest.approx(losses.tolist(), abs=1e-4)
    # With the shortlist there are no whole logits, and the texts are the same.
    monkeypatch.setattr("shl.models.generate.shortlist_applies", lambda _: True)
    listed = generate(model, PROMPTS, **options)
    assert listed == found
    assert all(c.base_nll == () for c in listed)


def test_replay_needs_the_doses_and_the_rewinds(gemma):
    """At the dose of the start, or without the new cache after a rewind, tokens are others."""
    found = steered(gemma, ByNll(limit=3.7), -1.5)
    texts = [c for c in found if c.rewinds and 0 < c.rewinds[-1][0] < len(c.tokens)]
    assert texts
    for c in texts:
        exact = replay(gemma, c, V)
        for changed in (replace(c, doses=(), rewinds=()), replace(c, rewinds=())):
            assert (replay(gemma, changed, V) - exact).abs().max() > 0.01
    assert any(
        replay(gemma, replace(c, doses=(), rewinds=()), V).argmax(1).tolist() != list(c.tokens)
        for c in texts
    )


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 99),
    limit=st.floats(3.2, 5.0),
    doses=st.lists(st.sampled_from([-1.5, 0.0, 0.5, 1.0, 2.0]), min_size=5, max_size=5),
    window=st.integers(2, 9),
    size=st.integers(2, 5),
    new=st.integers(1, 26),
)
def test_rows_of_any_batch_do_not_influence_each_other(seed, limit, doses, window, size, new):
    model = tiny_gemma()
    model.unembed.b_U.data[EOS] = 1.0  # some rows end early
    backtrack = ByNll(limit=limit, window=window, recover_after=window)
    sampled = {"temperature": 1.0, "seed": seed, "max_new_tokens": new}
    dose = torch.tensor(doses)
    batched = steered(model, backtrack, dose, batch_size=size, **sampled)
    assert batched == steered(model, backtrack, dose, batch_size=1, **sampled)
    plain = steered(model, dose=dose, batch_size=1, **sampled)
    for c, other in zip(batched, plain, strict=True):
        assert c == other if c.dose == 0 else c.rewinds or c == other
        assert len(c.rewinds) <= 3
        assert all(abs(d) <= abs(c.dose) for d in c.doses)


def test_a_sampled_text_is_drawn_from_the_replayed_distributions(gemma):
    config, fresh = GenerateConfig(), 0
    texts = steered(gemma, ByNll(limit=4.1), prompts=PROMPTS[:1] * 5, temperature=1.0, seed=3)
    for i, c in enumerate(texts):
        keys = [("token", i)] * len(c.tokens)
        for attempt, (kept, _) in enumerate(c.rewinds, 1):
            keys[kept:] = [("token", i, "attempt", attempt)] * (len(c.tokens) - kept)
        draws = [
            float(torch.rand(45, generator=generator_for(3, *k))[t]) for t, k in enumerate(keys)
        ]
        if c.tokens:
            drawn = sample(replay(gemma, c, V), torch.tensor(draws), config)
            assert drawn.tolist() == list(c.tokens)
        fresh += sum(len(key) > 2 for key in keys)
    assert fresh > 0


def test_windows_have_the_scores_of_base(model):
    @dataclass(frozen=True)
    class Seen(ByNll):
        scores: dict = None

        def reasons(self, text, nll, top):
            self.scores[text] = list(nll), list(top)
            return super().reasons(text, nll, top)

    seen = Seen(limit=3.6, scores={})
    with V.steering(model, 1.0):
        texts = generate(model, PROMPTS, temperature=0.0, max_new_tokens=21, backtrack=seen)
    rewound = [c for c in texts if c.rewinds and c.tokens]
    assert rewound
    for c in rewound:
        nll, top = seen.scores[c.text]
        assert nll == pytest.approx(token_nll(model, [c])[0].tolist(), abs=1e-4)
        largest = log_p_by_hand(model, c).exp().amax(1)
        assert top == pytest.approx(largest.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"half_life": 8.0}, {"positions": slice(3, 30)}, {"gate": "cosine"}, {"record": True}],
    ids=lambda options: next(iter(options)),
)
def test_options_of_the_steering_hold_after_a_rewind(gemma, options):
    backtrack = ByLength(most=4, times=1, window=4, seen=[])
    texts = []
    for prompts, kept in ((PROMPTS[:1], options), (PROMPTS[:1] * 2, options), (PROMPTS[:1], {})):
        backtrack.seen.clear()
        texts += steered(gemma, backtrack, prompts=prompts, options=kept, temperature=1.0)[:1]
    assert texts[0] == texts[1]
    assert texts[0].rewinds == ((4, 0.6),)
    assert (texts[0] == texts[2]) == ("record" in options)


def test_the_steering_has_its_own_dose_again(gemma, monkeypatch):
    hooks = hook_count(gemma)
    for dose, expected in ((1.0, (False, None)), (torch.ones(5), (True, 5))):
        with V.steering(gemma, dose) as steering:
            before = hook_count(gemma)
            generate(gemma, PROMPTS, **GREEDY, backtrack=ByNll(limit=3.2))
            assert steering.dose is steering.scope.dose is dose
            assert hook_count(gemma) == before
            after = [generate(gemma, PROMPTS, **GREEDY)]

            def fail(*_args, **_kwargs):
                raise KeyError

            with monkeypatch.context() as patch:
                patch.setattr("shl.method.backtrack.Watched._rewind", fail)
                with pytest.raises(KeyError):
                    generate(gemma, PROMPTS, **GREEDY, backtrack=ByNll(limit=3.2))
            assert steering.dose is steering.scope.dose is dose
            assert (steering.per_row, steering.rows) == expected
            after.append(generate(gemma, PROMPTS, **GREEDY))
            assert after[0] == after[1]
    assert hook_count(gemma) == hooks


def test_only_the_innermost_steering_is_weakened(gemma):
    with V.steering(gemma, 0.5) as outer:
        [c] = steered(gemma, ByLength(most=12, times=1, seen=[]), prompts=PROMPTS[:1])
        exact = replay(gemma, c, V)
        assert exact.argmax(1).tolist() == list(c.tokens)
        assert outer.dose == 0.5
    assert (replay(gemma, c, V) - exact).abs().max() > 0.01
    with V.steering(gemma) as off, suspended(gemma, off), pytest.raises(ShlError) as error:
        generate(gemma, PROMPTS, backtrack=Backtrack())
    assert "no steering is active" in one_sentence(error)


def test_a_prompt_of_one_token_and_doses_by_position_are_rejected(gemma):
    with V.steering(gemma), pytest.raises(ShlError) as error:
        generate(gemma, [Prompt("", plain=True)], backtrack=Backtrack())
    assert "a prompt has 1 token" in one_sentence(error)
    with V.steering(gemma, torch.ones(1, 9)), pytest.raises(ShlError) as error:
        generate(gemma, ["Hi?"])
    assert "doses of shape (1, 9)" in one_sentence(error)


TEXT = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
WORDS = TEXT.split()


@pytest.mark.parametrize(
    ("text", "nll", "top", "found"),
    [
        ("", [3.4] * 8, [0.1] * 8, ()),  # log 30 is 3.401
        ("", [3.41] * 8, [0.1] * 8, ("incoherent",)),
        ("", [9.0] * 8 + [3.3] * 8, [0.1] * 16, ()),  # only the last window counts
        ("", [0.1] * 16 + [3.0] * 8, [0.1] * 24, ()),
        ("", [0.1] * 16 + [3.2] * 8, [0.1] * 24, ("rise",)),
        ("", [0.1] * 8 + [2.1] * 8 + [3.2] * 8, [0.1] * 24, ()),  # over the mean of all before
        ("", [1.0] * 3, [0.96] * 3, ("too_predictable",)),
        ("", [1.0] * 16, [0.96] * 8 + [0.94] * 8, ()),
        (" ".join([*WORDS, "again", "more"]), [1.0] * 8, [0.1] * 8, ()),
        (" ".join([*WORDS[:12], *["again"] * 4]), [1.0] * 8, [0.1] * 8, ("word_loop", "char_loop")),
        (" ".join([*WORDS[:8], *["again"] * 4]), [1.0] * 8, [0.1] * 8, ()),  # too few words
        (" ".join(WORDS) + " so it goes" + "!" * 6, [1.0] * 8, [0.1] * 8, ("char_loop",)),
    ],
)
def test_a_window_goes_wrong_by_hand(text, nll, top, found):
    assert len(WORDS) + 2 == FEW_WORDS
    assert Backtrack().reasons(text, nll, top) == found


def test_a_window_at_its_bounds_has_not_gone_wrong():
    # Means of halves and whole numbers are exact; the logarithm of a perplexity of 1 is 0.
    at = Backtrack(max_rise=2.0, max_top_prob=0.5)
    assert at.reasons("", [1.0] * 8 + [3.0] * 8, [0.5] * 16) == ()
    assert at.reasons("", [1.0] * 8 + [3.5] * 4 + [3.0] * 4, [0.5] * 16) == ("rise",)
    assert at.reasons("", [1.0] * 8, [0.5] * 7 + [0.75]) == ("too_predictable",)
    one = Backtrack(filter=FilterConfig(max_tail_perplexity=1.0, min_perplexity=1.0))
    assert one.reasons("", [0.0] * 8, [0.1] * 8) == ()
    assert one.reasons("", [0.0] * 7 + [0.5], [0.1] * 8) == ("incoherent",)


def test_every_rewind_without_a_clean_window_goes_one_window_further_back():
    # 30 tokens are 3 whole windows of 8 and 6 more; 30 - 24 = 6, so 8 is as far back as it may go.
    assert [Backtrack(max_rewind=24).kept(30, again) for again in range(5)] == [24, 16, 8, 8, 8]
    assert [Backtrack(max_rewind=40).kept(30, again) for again in range(5)] == [24, 16, 8, 0, 0]
    assert [Backtrack(max_rewind=24).kept(n, 0) for n in (1, 8, 9, 16, 17)] == [0, 0, 8, 8, 16]


@given(
    count=st.integers(1, 200),
    again=st.integers(0, 5),
    window=st.integers(1, 20),
    more=st.integers(0, 20),
)
def test_what_is_kept_is_whole_windows_and_not_too_far_back(count, again, window, more):
    kept = Backtrack(window=window, max_rewind=window + more).kept(count, again)
    assert kept % window == 0
    assert 0 <= kept < count
    assert count - kept <= window + more
    assert again or count - kept <= window


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"max_rewind": 7}, "max_rewind is 7, it must be at least 8"),
        ({"factor": 0.0}, "factor is 0.0"),
        ({"factor": 1.1}, "factor is 1.1"),
        ({"recover_by": 0.9}, "recover_by is 0.9"),
        ({"max_rise": math.nan}, "max_rise is nan"),
    ],
)
def test_settings_out_of_range_are_named(change, named):
    with pytest.raises(ShlError) as error:
        Backtrack(**change)
    assert one_sentence(error).startswith(named)


def test_a_dose_table_has_the_sign_of_the_steering(gemma):
    [text] = steered(gemma, ByLength(most=12, times=1, seen=[]), prompts=["Hi?"])
    [plain] = steered(gemma, prompts=["Hi?"], max_new_tokens=2)
    first = len(text.prompt_tokens) - 1
    table = dose_table([text, plain], -0.5)
    assert table[0].tolist() == pytest.approx([-1.0] * first + [-d for d in text.doses] + [-0.75])
    assert table[1].tolist() == [-0.5] * table.shape[1]


def test_a_dose_table_by_hand():
    # Three prompt tokens, of which the last predicts the first of two tokens; the second row has no
    # doses of its own and is one token longer.
    own = Completion(Prompt("?"), "ab", (5, 6), (2, 9, 7), 1.0, doses=(0.75, 0.5))
    other = Completion(Prompt("?"), "abc", (5, 6, 7), (2, 9, 7), 1.0)
    table = dose_table([own, other], 1.0)
    assert table.tolist() == [[0.75, 0.75, 0.75, 0.5, 0.5, 0.5], [1.0] * 6]
    assert dose_table([own], -2.0).tolist() == [[-0.75, -0.75, -0.75, -0.5, -0.5]]
    assert dose_table([own], 0.25)[0].tolist() == [0.75, 0.75, 0.75, 0.5, 0.5]
