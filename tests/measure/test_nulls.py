"""Random vectors at matched divergence."""

import numpy as np
import pytest
import torch

from shl.hooks.handle import handles_on
from shl.hooks.steering import Steering
from shl.measure.nulls import (
    NEUTRAL,
    Divergence,
    Nulls,
    matched_scales,
    matching_scale,
    nulls,
    random_directions,
)
from shl.models.activations import residual_at_tag
from shl.models.scores import token_divergence
from shl.models.tokens import Prompt
from shl.utils.errors import ShlError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder that does not exist yet."""
    monkeypatch.setenv("SHL_CACHE", str(tmp_path / "not" / "made"))
    return tmp_path / "not" / "made"


def residual(model):
    """A reading that steering at layer 1 changes by the same amount per unit of its direction."""
    return float(residual_at_tag(model, [Prompt("Hi?")], (1,))[1].mean())


def test_divergence_is_the_mean_kl_per_token_of_each_text(gemma):
    measure = Divergence(gemma, ["Hi?", "Why?"], tokens=4)
    assert measure(gemma) == pytest.approx([0.0, 0.0], abs=1e-6)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    with Steering(gemma, {1: direction}, 1.0):
        expected = [float(token_divergence(gemma, c).mean()) for c in measure.texts]
        assert measure(gemma) == pytest.approx(expected, rel=1e-3)
    assert min(expected) > 1e-3


def test_with_a_persona_the_same_answers_are_read_after_it(gemma):
    measure = Divergence(gemma, ["Hi?"], tokens=4)
    assert measure(gemma, "You are calm and kind.")[0] > 1e-4


@pytest.mark.parametrize("power", [1.5, 2.0, 3.5])
def test_the_scale_is_found_for_any_growth(power):
    tried = []

    def divergence(scale):
        tried.append(scale)
        return 0.7 * scale**power

    scale = matching_scale(divergence, 0.2, 0.5)
    assert 0.7 * scale**power == pytest.approx(0.2, rel=0.05)
    assert len(tried) <= 5


def test_a_level_out_of_reach_is_refused():
    with pytest.raises(ShlError, match="no scale up to 1024 times the first comes within 5%"):
        matching_scale(lambda scale: min(scale, 1.0), 3.0)


def test_both_signs_are_matched_on_average_to_five_per_cent(gemma):
    levels = (0.01, 0.05)
    scales = matched_scales(gemma, (1, 2), count=2, levels=levels)
    measure = Divergence(gemma, NEUTRAL, tokens=16)
    means = residual_at_tag(gemma, [Prompt(text) for text in NEUTRAL], (1, 2))
    norms = {layer: float(x.norm(dim=1).mean()) for layer, x in means.items()}
    for number in range(2):
        unit = random_directions(norms, 32, number)
        for level, scale in zip(levels, scales[:, number].tolist(), strict=True):
            both = []
            for sign in (1, -1):
                with Steering(gemma, unit, sign * scale):
                    both.append(measure(gemma).mean())
            assert np.mean(both) == pytest.approx(level, rel=0.05)


def test_matching_starts_from_the_scale_of_the_vector_before(gemma, monkeypatch):
    starts = []

    def scale(divergence, level, start):
        starts.append(start)
        return start + level

    monkeypatch.setattr("shl.measure.nulls.matching_scale", scale)
    scales = matched_scales(gemma, (1,), count=2, levels=(0.1, 0.7))
    once, twice = [0.005 + 0.1, 0.005 + 0.7], [0.005 + 0.1 + 0.1, 0.005 + 0.7 + 0.7]
    assert starts == [0.005, 0.005, *once]
    assert scales.T.tolist() == [once, twice]


def test_signs_of_uneven_divergence_are_matched_by_their_mean(gemma, monkeypatch):
    """3 d^2 and d^2 for the two signs have a mean of 2 d^2, which is 0.02 at a scale of 0.1."""

    class Uneven:
        def __init__(self, *_, **__):
            pass

        def __call__(self, model):
            (handle,) = handles_on(model)
            return np.array([(3.0 if handle.dose > 0 else 1.0) * handle.dose**2])

    monkeypatch.setattr("shl.measure.nulls.Divergence", Uneven)
    scales = matched_scales(gemma, (1,), count=1, levels=(0.02,))
    assert scales.item() == pytest.approx(0.1, rel=0.02)


def test_readings_are_less_bases_and_kept_by_content(gemma, cache):
    calls = []

    def read(model):
        calls.append(1)
        return residual(model)

    table = nulls(gemma, (1,), "demo", "items", read, count=2, levels=(0.01,))
    assert table.values.shape == (1, 2, 2)
    # What the residual of the steered layer reads is linear in the dose, so the signs are opposite.
    assert table.values[0, :, 0] == pytest.approx(-table.values[0, :, 1], rel=1e-3)
    assert len(calls) == 5
    assert not handles_on(gemma)
    again = nulls(gemma, (1,), "demo", "items", read, count=2, levels=(0.01,))
    assert np.array_equal(again.values, table.values)
    assert len(calls) == 5
    nulls(gemma, (1,), "demo", "other items", read, count=2, levels=(0.01,))
    assert len(calls) == 10
    assert len(list((cache / "nulls").iterdir())) == 3  # scales once, readings twice


def test_hooks_on_the_model_do_not_act(gemma):
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    seen = []

    def read(model):
        seen.append(len(handles_on(model)))
        return residual(model)

    with Steering(gemma, {1: direction}, 3.0):
        nulls(gemma, (1,), "demo", "x", read, count=1, levels=(0.01,))
    assert seen == [0, 1, 1]  # base, and each sign of the random vector alone


def test_interval_by_hand():
    values = np.array([[[1.0, -2.0], [3.0, -4.0]], [[2.0, -4.0], [6.0, -8.0]]])
    table = Nulls((0.25, 1.0), values)
    assert table.interval(0.25) == (-4.0, 4.0)
    # sqrt(0.5625) = 0.75 lies half-way from 0.5 to 1: 6. Beyond the ends in proportion to the root.
    assert table.interval(0.5625) == pytest.approx((-6.0, 6.0))
    assert table.interval(0.0625) == pytest.approx((-2.0, 2.0))
    assert table.interval(4.0) == pytest.approx((-16.0, 16.0))
    # Three of four magnitudes (1, 2, 3, 4) are at most 3.
    assert table.interval(0.25, 0.6) == pytest.approx((-3.0, 3.0))
