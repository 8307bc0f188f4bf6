"""Halving of batches that do not fit, and checks for non-finite numbers."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from helpers import one_sentence, random_adapter, small_loop

from shl.config import EvalConfig, HealConfig
from shl.hooks.handle import suspended
from shl.measure.vignettes import evaluate
from shl.method.axes import load_axis
from shl.method.extract import extract_vector
from shl.method.heal import train_adapter
from shl.method.loop import baselines, love
from shl.models.activations import residual_at_tag
from shl.models.generate import generate
from shl.models.nan_checks import NotFiniteError
from shl.models.scores import token_nll
from shl.models.tiny import tiny_gemma
from shl.utils.errors import ShlError, in_batches

AXIS = load_axis("care_auth")
PROMPTS = [f"What {'about ' * i}this?" for i in range(6)]


@pytest.fixture
def small_gpu(monkeypatch):
    """`small_gpu(n)`: a forward of more than n rows runs out of memory, after it has computed."""

    def limit(model, rows):
        forward = type(model).forward

        def checked(self, tokens, *args, **kwargs):
            out = forward(self, tokens, *args, **kwargs)
            if len(tokens) > rows:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return out

        monkeypatch.setattr(type(model), "forward", checked)

    return limit


def test_in_batches_halves_a_failing_batch_and_later_ones():
    done = []

    def work(rows):
        if len(rows) > 2:
            raise torch.OutOfMemoryError
        done.append(rows)

    with pytest.warns(RuntimeWarning, match="rows did not fit") as warned:
        in_batches([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], work, "work")
    # 5 is halved to 3, 3 to 2; the second five are cut to 2 without failing first.
    assert done == [[0, 1], [2], [3, 4], [5, 6], [7, 8], [9]]
    assert [str(w.message).split(" did")[0] for w in warned] == ["work of 5 rows", "work of 3 rows"]


def test_a_single_row_that_does_not_fit_is_an_error():
    def work(rows):
        raise torch.OutOfMemoryError

    with pytest.raises(ShlError) as error:
        in_batches([[0]], work, "scoring")
    assert "too little memory for scoring of a single row" in one_sentence(error)


@pytest.mark.filterwarnings("ignore:.*did not fit into the GPU")
def test_generation_scoring_and_extraction_continue_with_smaller_batches(gemma, small_gpu):
    whole = generate(gemma, PROMPTS, max_new_tokens=6, seed=1)
    losses = token_nll(gemma, whole)
    tags = residual_at_tag(gemma, PROMPTS, [1])
    small_gpu(gemma, 2)
    halved = generate(gemma, PROMPTS, max_new_tokens=6, seed=1)
    assert [c.tokens for c in halved] == [c.tokens for c in whole]
    for a, b in zip(token_nll(gemma, whole), losses, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(residual_at_tag(gemma, PROMPTS, [1])[1], tags[1])


@pytest.mark.filterwarnings("ignore:.*did not fit into the GPU")
def test_the_probe_continues_with_smaller_batches(small_gpu):
    model, again = tiny_gemma(), tiny_gemma()
    whole = evaluate(model, config=EvalConfig(batch_size=4))
    small_gpu(again, 14)  # two vignettes of seven options each
    halved = evaluate(again, config=EvalConfig(batch_size=4))
    assert abs(whole.log_probs - halved.log_probs).max() < 1e-4


@pytest.mark.filterwarnings("ignore:.*did not fit into the GPU")
@pytest.mark.parametrize("how", ["rows", "memory"])
@pytest.mark.parametrize("divergence", ["kl_rev", "none"])
def test_training_with_fewer_rows_per_forward_is_equivalent(how, divergence, gemma, small_gpu):
    texts = generate(gemma, PROMPTS, max_new_tokens=8, min_new_tokens=3, seed=2)
    config = HealConfig(
        rank=2, epochs=2, lr=1e-2, batch_size=4, tau=0.0, divergence=divergence, sv_penalty=0.1
    )
    whole = train_adapter(gemma, texts, config)
    if how == "rows":
        parts = train_adapter(gemma, texts, replace(config, rows=1))
    else:
        small_gpu(gemma, 1)
        parts = train_adapter(gemma, texts, config)
    for a, b in zip(whole.steps, parts.steps, strict=True):
        assert a.reward is b.reward is None
        one, other = (list(vars(replace(step, reward=0.0)).values()) for step in (a, b))
        assert other == pytest.approx(one, rel=2e-3, abs=1e-5)
    for a, b in zip(whole.adapter.parameters(), parts.adapter.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


def model_with_nan(name):
    """A model with one NaN in the weight `name`."""
    model = tiny_gemma()
    weight = dict(model.named_parameters())[name].data
    weight[(0,) * weight.ndim] = torch.nan
    return model


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("blocks.1.mlp.W_in", "blocks.1.mlp.hook_pre_linear"),
        ("blocks.2.attn.W_Q", "blocks.2.attn.hook_q"),
        ("embed.W_E", "embed"),
    ],
)
def test_the_error_for_a_nan_names_its_site(name, site):
    model = model_with_nan(name)
    # One NaN in the embedding would be that of the padding token 0.
    if name == "embed.W_E":
        model.embed.W_E.data.fill_(torch.nan)
    with pytest.raises(NotFiniteError) as error:
        generate(model, ["Hi?"])
    text = "a logit of token 0 is nan, it must be finite; the first site with such a number is"
    assert one_sentence(error) == f"{text} {site}."


def test_the_error_for_a_nan_names_stage_and_round():
    model = model_with_nan("blocks.1.mlp.W_in")
    with pytest.raises(NotFiniteError) as error:
        baselines(model, AXIS, small_loop())
    assert one_sentence(error).startswith("measuring base: a score of a stem is nan")
    with pytest.raises(NotFiniteError) as error:
        next(love(model, AXIS, small_loop()))
    assert one_sentence(error).startswith("round 0, extracting the vector: a residual")
    assert "blocks.1.mlp.hook_pre_linear" in str(error.value)


def test_the_error_for_a_nan_gradient_names_its_site(gemma, monkeypatch):
    texts = generate(gemma, PROMPTS[:2], max_new_tokens=4, min_new_tokens=2)
    step = import_module("shl.method.barrier")
    penalty = step.singular_value_penalty

    def broken(adapter):
        return penalty(adapter) + adapter.up["blocks.1.v"].sum() * torch.nan

    monkeypatch.setattr(step, "singular_value_penalty", broken)
    with pytest.raises(NotFiniteError) as error:
        train_adapter(gemma, texts, HealConfig(rank=2, sv_penalty=1.0), index=3)
    assert one_sentence(error) == (
        "epoch 0, step 0: the gradient of B at blocks.1.v is not finite, it must be."
    )


def test_the_error_names_the_site_with_a_dose_per_row(gemma):
    vector = extract_vector(gemma, AXIS, [1], contexts=2)
    adapter = random_adapter(gemma, ("down",), (2,))
    adapter.up["blocks.2.down"].fill_(torch.inf)
    doses = torch.tensor([0.5, 1.0, 1.5])
    with (
        adapter.attach(gemma),
        vector.steering(gemma, doses),
        pytest.raises(NotFiniteError, match=r"blocks\.2\.mlp"),
    ):
        generate(gemma, PROMPTS[:3], max_new_tokens=2)
    with suspended(gemma):
        assert generate(gemma, PROMPTS[:1], max_new_tokens=2)
