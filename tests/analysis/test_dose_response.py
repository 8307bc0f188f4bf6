"""Every dose of the batch against the same dose alone, in float64 from full logits."""

import pytest
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
def test_each_dose_is_the_one_that_steering_alone_gives(model, vector, texts, batch_size):
    response = dose_response(model, vector, texts, DOSES, batch_size=batch_size)
    assert response.doses == tuple(DOSES)
    for dose, row in zip(DOSES, response.kl, strict=True):
        for text, kl in zip(texts, row, strict=True):
            base = log_p_by_hand(model, text)
            with vector.steering(model, dose):
                expected = kl_by_hand(log_p_by_hand(model, text), base)
            assert kl.shape == (len(text.tokens),)
            assert (kl - expected).abs().max() <= 2e-5 + 1e-4 * expected.max()


def test_one_forward_holds_every_dose(model, vector, texts, monkeypatch):
    widths = []
    real = type(model).forward

    def counted(self, tokens, *args, **kwargs):
        widths.append(len(tokens))
        return real(self, tokens, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counted)
    dose_response(model, vector, texts, DOSES)
    assert widths == [3, 12]  # base, and 4 doses of 3 texts


def test_base_has_no_adapter_and_the_doses_keep_it(gemma, texts_of_gemma):
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


def test_divergences_are_aggregates_of_the_tokens(model, vector, texts):
    response = dose_response(model, vector, texts, [0.5])
    kl = response.kl[0][1].double()
    assert float(response.divergence("mean")[0, 1]) == pytest.approx(float(kl.mean()), rel=1e-5)
    assert float(response.divergence()[0, 1]) == pytest.approx(
        float(kl.square().mean().sqrt()), rel=1e-5
    )
    assert response.divergence("max").shape == (1, 3)


@pytest.mark.parametrize(
    ("doses", "texts", "said"),
    [
        ([], None, "doses is empty"),
        ([1.0], [], "completions is empty"),
        ([1.0], [Completion(Prompt("a"), "", (), (2, 5))], "without tokens"),
        ([float("nan")], None, "must be finite"),
    ],
)
def test_what_has_no_response_is_refused(gemma, texts_of_gemma, doses, texts, said):
    vector = extract_vector(gemma, load_axis("love"), layers=[1], contexts=3)
    with pytest.raises(ShlError) as error:
        dose_response(gemma, vector, texts_of_gemma if texts is None else texts, doses)
    assert said in one_sentence(error)
