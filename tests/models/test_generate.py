"""Generation: batches equal single rows, seeds and doses follow their rows, turn ends are cut."""

import inspect

import pytest
import torch
from helpers import hook_count, one_sentence

from shl.config import GenerateConfig
from shl.hooks.handle import ROWS
from shl.hooks.vector import SteeringVector
from shl.models.generate import generate
from shl.models.tiny import tiny_gemma, tiny_hf
from shl.models.tokens import Prompt, encode_text
from shl.utils.errors import ShlError

MODULE = "shl.models.generate"

PROMPTS = ["Tell me about your long and quiet day?", "Hi?", "Why is that so?", "A b?", "What now?"]
EOS = 1


@pytest.fixture(scope="module")
def ending():
    """A tiny Gemma that sometimes ends its turn."""
    model = tiny_gemma()
    model.unembed.b_U.data[EOS] = 1.3
    return model


@pytest.fixture
def vector(gemma):
    v = torch.randn(32, generator=torch.Generator().manual_seed(0))
    return SteeringVector({1: 2 * v}, "tiny", "demo", 1)


def tokens(completions):
    return [c.tokens for c in completions]


@pytest.mark.parametrize("batch_size", [2, 5])
def test_greedy_batches_equal_one_by_one(model, batch_size):
    batched = generate(model, PROMPTS, temperature=0.0, max_new_tokens=12, batch_size=batch_size)
    single = [generate(model, [p], temperature=0.0, max_new_tokens=12)[0] for p in PROMPTS]
    assert tokens(batched) == tokens(single)
    assert [c.prompt for c in batched] == [Prompt(p) for p in PROMPTS]
    assert len(set(tokens(batched))) > 1


def test_greedy_equals_transformers(gemma):
    hf = tiny_hf()
    completions = generate(gemma, PROMPTS, temperature=0.0, max_new_tokens=16)
    for completion in completions:
        ids = torch.tensor([completion.prompt_tokens])
        expected = hf.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16
        )[0, ids.shape[1] :].tolist()
        own = [*completion.tokens, EOS] if completion.ended else [*completion.tokens]
        assert own == expected


def test_rows_that_finish_early_do_not_change_the_others(ending):
    batched = generate(ending, PROMPTS, max_new_tokens=20, seed=3)
    lengths = [len(c.tokens) for c in batched]
    assert min(lengths) < 20 == max(lengths)
    assert [c.ended for c in batched] == [length < 20 for length in lengths]
    alone = generate(ending, PROMPTS, max_new_tokens=20, seed=3, batch_size=1)
    assert tokens(alone) == tokens(batched)
    assert all(EOS not in c.tokens for c in batched)


def test_seeds_and_rows_have_different_random_streams(gemma):
    one, two = (generate(gemma, PROMPTS, max_new_tokens=10, seed=seed) for seed in (7, 8))
    assert all(a.text != b.text for a, b in zip(one, two, strict=True))
    same = generate(gemma, ["Hi?"] * 6, max_new_tokens=10, seed=7)
    assert len({c.text for c in same}) == 6


def test_doses_follow_their_rows_through_sorting_and_early_ends(ending, vector):
    doses = [1.0, -1.5, 0.0, 2.0, -0.5]
    with vector.steering(ending, dose=torch.tensor(doses)):
        batched = generate(ending, PROMPTS, temperature=0.0, max_new_tokens=20, batch_size=3)
    assert [c.dose for c in batched] == doses
    lengths = {len(c.tokens) for c in batched}
    assert min(lengths) < max(lengths)  # some rows finished early
    for prompt, dose, got in zip(PROMPTS, doses, batched, strict=True):
        with vector.steering(ending, dose=dose):
            (expected,) = generate(ending, [prompt], temperature=0.0, max_new_tokens=20)
        assert got.tokens == expected.tokens
        assert expected.dose == dose
    plain = generate(ending, PROMPTS, temperature=0.0, max_new_tokens=20)
    assert tokens(plain)[2] == tokens(batched)[2]
    assert tokens(plain) != tokens(batched)
    assert {c.dose for c in plain} == {0.0}


def test_numbers_of_doses_and_prompts_must_be_equal(gemma, vector):
    with vector.steering(gemma, dose=torch.ones(3)), pytest.raises(ShlError) as error:
        generate(gemma, PROMPTS, max_new_tokens=2)
    assert "a hook has doses or a mask for 3 rows, there are 5 prompts" in one_sentence(error)


def test_steering_equals_a_transformerlens_hook(gemma, vector):
    plain = generate(gemma, PROMPTS, temperature=0.0, max_new_tokens=8)
    own = [("blocks.1.hook_resid_post", lambda h, hook: h + vector.directions[1])]
    with gemma.hooks(fwd_hooks=own):
        hooked = generate(gemma, PROMPTS, temperature=0.0, max_new_tokens=8)
    with vector.steering(gemma):
        steered = generate(gemma, PROMPTS, temperature=0.0, max_new_tokens=8)
    assert tokens(hooked) == tokens(steered)
    assert tokens(hooked) != tokens(plain)


def test_no_turn_ends_before_min_new_tokens():
    model = tiny_gemma(n_layers=1)
    model.unembed.b_U.data[EOS] = 1e4  # EOS is always the most likely token
    for temperature in (0.0, 1.0):
        none = generate(model, PROMPTS, temperature=temperature)
        assert [(c.tokens, c.text, c.ended) for c in none] == [((), "", True)] * 5
        some = generate(model, PROMPTS, temperature=temperature, min_new_tokens=5)
        assert [(len(c.tokens), c.ended) for c in some] == [(5, True)] * 5
        assert all(EOS not in c.tokens for c in some)


def scripted(monkeypatch, model, texts):
    """Make the model generate `texts`, one per row, one character per step, and then dots."""
    ids = [encode_text(model, text) for text in texts]
    dot = encode_text(model, ".")[0]
    step = [0] * len(texts)

    def logits(model, residual, *, k=0):
        out = torch.full((len(residual), model.cfg.d_vocab), -20.0)
        for at, row in enumerate(ROWS.get().tolist()):
            out[at, ids[row][step[row]] if step[row] < len(ids[row]) else dot] = 20.0
            step[row] += 1
        return out, torch.arange(model.cfg.d_vocab).expand(len(out), -1)

    monkeypatch.setattr(f"{MODULE}.next_logits", logits)


def test_stop_text_is_removed_completely(gemma, monkeypatch):
    texts = [" Rest.\nQ: And", " Sleep\n\nA: x", "\nQ: at once", " Q: no\nB\n Q:", " Q\nQ"]
    scripted(monkeypatch, gemma, texts)
    got = generate(gemma, ["a?", "b?", "c?", "d?", "e?"], temperature=0.0, max_new_tokens=16)
    assert [c.text.rstrip("\n") for c in got[:3]] == [" Rest.", " Sleep", ""]
    assert [c.ended for c in got] == [True, True, True, False, False]
    assert all("\nQ" not in c.text for c in got[:3])
    # Without a stop text the completion has all tokens up to the limit.
    assert got[3].text == " Q: no\nB\n Q:" + "." * 4
    assert got[4].text == " Q\nQ" + "." * 12
    for c in got:
        assert c.text == "".join(gemma.tokenizer.decode([i]) for i in c.tokens)


def test_prompt_and_completion_longer_than_the_context_are_rejected(gemma):
    # BOS, "Q: ", "\nA:" and 500 characters are 507 tokens of a context of 512.
    assert len(generate(gemma, ["x" * 500], max_new_tokens=5, min_new_tokens=5)[0].tokens) == 5
    with pytest.raises(ShlError) as error:
        generate(gemma, ["x" * 500], max_new_tokens=6)
    assert "507 tokens and 6 new ones" in one_sentence(error)
    assert generate(gemma, []) == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_logits_are_rejected(temperature, bad):
    model = tiny_gemma(n_layers=1)
    model.unembed.b_U.data[5] = bad
    with pytest.raises(ShlError) as error:
        generate(model, ["Hi?"], temperature=temperature)
    assert f"a logit of token 0 is {bad}" in one_sentence(error)
    assert "the first site with such a number is unembed" in str(error.value)
    assert ROWS.get() is None


def test_exception_in_a_step_resets_rows_and_hooks(gemma, vector):
    calls = []

    def fail_at_the_third(h, hook):
        assert ROWS.get() is not None
        calls.append(h.shape)
        if len(calls) == 3:
            raise RuntimeError("step")

    with (
        pytest.raises(RuntimeError, match="step"),
        gemma.hooks(fwd_hooks=[("blocks.0.hook_resid_post", fail_at_the_third)]),
        vector.steering(gemma, dose=torch.ones(2)),
    ):
        generate(gemma, ["Hi?", "You?"], max_new_tokens=8)
    assert ROWS.get() is None
    assert hook_count(gemma) == 0
    assert [shape[1] for shape in calls[1:]] == [1, 1]  # with the cache, one token per step


def test_stop_text_before_min_new_tokens_is_kept(gemma, monkeypatch):
    # The first "\nQ:" does not end the turn, which has at least 5 tokens; the second one does.
    scripted(monkeypatch, gemma, ["\nQ:abc\nQ: x"])
    (got,) = generate(gemma, ["a?"], temperature=0.0, max_new_tokens=16, min_new_tokens=5)
    assert (got.text.rstrip("\n"), got.ended) == ("\nQ:abc", True)


def test_inference_mode_does_not_change_tokens(model):
    expected = generate(model, PROMPTS, max_new_tokens=20)
    with torch.inference_mode():
        inside = generate(model, PROMPTS, max_new_tokens=20)
    assert tokens(inside) == tokens(expected)


def test_defaults_equal_those_of_generate_config():
    defaults = {k: p.default for k, p in inspect.signature(generate).parameters.items()}
    assert {k: defaults[k] for k in vars(GenerateConfig())} == vars(GenerateConfig())
