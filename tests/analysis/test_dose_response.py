"""Each dose of a batch against the same dose alone, in float64 from full logits."""

import pytest
import torch
from helpers import kl_by_hand, log_p_by_hand, one_sentence, random_adapter

from shl.analysis.dose_response import dose_response
from shl.hooks.bake import baked
from shl.method.axes import load_axis
from shl.method.extract import extract_vector
from shl.models.generate import Completion, generate
from shl.models.tokens import Prompt
from shl.utils.errors import ShlError

DOSES = [1.0, 0.0, -0.5, 0.25]


@pytest.fixture
def vector(model):
    return extract_vector(model, load_axis("care_auth"), layers=[0, 2], contexts=4)


@pytest.fixture
def texts(model):
    prompts = ["Hi?", "A longer question than that one?", "Why?"]
    return generate(model, prompts, max_new_tokens=7, min_new_tokens=5, seed=1)


@pytest.mark.parametrize("batch_size", [64, 5])
def test_batched_doses_equal_single_ones(model, vector, texts, batch_size):
    response = dose_response(model, vector, texts, DOSES, batch_size=batch_size)
    assert response.doses == tuple(DOSES)
    for how, by_hand in (("mean", lambda x: x.mean()), ("rmse", lambda x: (x * x).mean().sqrt())):
        expected = by_hand(response.kl[3][1].double())
        assert float(response.divergence(how)[3, 1]) == pytest.approx(float(expected), rel=1e-5)
    assert torch.equal(response.divergence(), response.divergence("rmse"))
    assert response.divergence("max").shape == (4, 3)
    for dose, row in zip(DOSES, response.kl, strict=True):
        for text, kl in zip(texts, row, strict=True):
            base = log_p_by_hand(model, text)
            with vector.steering(model, dose):
                expected = kl_by_hand(log_p_by_hand(model, text), base)
            assert kl.shape == (len(text.tokens),)
            assert (kl - expected).abs().max() <= 2e-5 + 1e-4 * expected.max()


def test_all_doses_share_one_forward_pass(model, vector, texts, monkeypatch):
    widths = []
    real = type(model).forward

    def forward(self, tokens, *args, **kwargs):
        widths.append(len(tokens))
        return real(self, tokens, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", forward)
    dose_response(model, vector, texts, DOSES)
    assert widths == [3, 12]  # base, and 4 doses of 3 texts


def test_adapters_stay_on_under_the_doses_but_not_in_base(gemma, texts_of_gemma):
    vector = extract_vector(gemma, load_axis("care_auth"), layers=[2], contexts=4)
    base = log_p_by_hand(gemma, texts_of_gemma[0])
    with baked(gemma, [random_adapter(gemma, ["down"], (1,), size=0.1)]):
        expected = kl_by_hand(log_p_by_hand(gemma, texts_of_gemma[0]), base)
        response = dose_response(gemma, vector, texts_of_gemma, [0.0])
    assert expected.max() > 1e-3
    assert (response.kl[0][0] - expected).abs().max() <= 2e-5 + 1e-4 * expected.max()


@pytest.fixture
def texts_of_gemma(gemma):
    return generate(gemma, ["Hi?"], max_new_tokens=5, min_new_tokens=5)


@pytest.mark.parametrize(
    ("doses", "texts", "message"),
    [
        ([], None, "doses is empty"),
        ([1.0], [], "completions is empty"),
        ([1.0], [Completion(Prompt("a"), "", (), (2, 5))], "without tokens"),
        ([float("nan")], None, "must be finite"),
    ],
)
def test_invalid_input_is_rejected(gemma, texts_of_gemma, doses, texts, message):
    vector = extract_vector(gemma, load_axis("love"), layers=[1], contexts=3)
    with pytest.raises(ShlError) as error:
        dose_response(gemma, vector, texts_of_gemma if texts is None else texts, doses)
    assert message in one_sentence(error)
