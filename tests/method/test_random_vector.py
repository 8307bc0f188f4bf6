"""The random control: matched divergence, norms, independence and errors."""

import pytest
import torch
from helpers import kl_by_hand, log_p_by_hand, one_sentence

from shl.hooks.vector import SteeringVector
from shl.measure.nulls import random_like
from shl.models.generate import generate
from shl.models.tiny import tiny_gemma
from shl.utils.errors import ShlError

QUESTIONS = ["Hello?", "What is tea?"]


@pytest.fixture(scope="module")
def setting():
    model = tiny_gemma()
    generator = torch.Generator().manual_seed(5)
    directions = {i: (0.5 + i) * torch.randn(32, generator=generator) / 32**0.5 for i in (0, 1)}
    return model, SteeringVector(directions, "tiny", "demo", 1, rule="mean_difference")


def mean_kl(model, vector, dose):
    """Mean KL per token, in float64 from full logits of each greedy answer on its own row."""
    texts = generate(model, QUESTIONS, max_new_tokens=24, min_new_tokens=1, temperature=0.0)
    kl = []
    for text in texts:
        before = log_p_by_hand(model, text)
        with vector.steering(model, dose):
            kl.append(kl_by_hand(log_p_by_hand(model, text), before))
    return float(torch.cat(kl).mean())


@pytest.mark.parametrize("dose", [0.5, 2.0, -1.0])
def test_the_divergence_is_that_of_the_vector(setting, dose):
    model, vector = setting
    control = random_like(model, vector, QUESTIONS, dose=dose)
    aim = mean_kl(model, vector, dose)
    assert aim > 1e-4
    assert mean_kl(model, control, dose) == pytest.approx(aim, rel=0.05)


def test_norms_share_one_scale_and_directions_are_independent(setting):
    model, vector = setting
    control = random_like(model, vector, QUESTIONS)
    scales = [control.norms()[layer] / vector.norms()[layer] for layer in (0, 1)]
    assert scales[0] == pytest.approx(scales[1], rel=1e-5)
    # 32 dimensions: independent directions have cosines of about 1 / sqrt(32) = 0.18.
    assert all(abs(c) < 0.7 for c in control.cosine(vector).values())
    between = torch.cosine_similarity(control.directions[0], control.directions[1], dim=0)
    assert abs(float(between)) < 0.7
    assert (control.rule, vector.rule) == ("random", "mean_difference")


def test_directions_depend_on_the_seed(setting):
    model, vector = setting
    one, same, other = (random_like(model, vector, QUESTIONS, seed=s) for s in (1, 1, 2))
    assert torch.equal(one.directions[1], same.directions[1])
    assert float(one.cosine(other)[1]) < 0.9


def test_a_divergence_that_cannot_be_matched_is_rejected(setting, monkeypatch):
    model, vector = setting
    with pytest.raises(ShlError) as error:
        random_like(model, vector, QUESTIONS, dose=0.0)
    assert "it must be above 1e-05 to be matched" in one_sentence(error)
    # A range of scales that is too narrow.
    monkeypatch.setattr("shl.measure.nulls.RANGE", 1.0001)
    with pytest.raises(ShlError) as error:
        random_like(model, vector, QUESTIONS, dose=2.0)
    assert "no scale up to 1.0001 times the first" in one_sentence(error)
