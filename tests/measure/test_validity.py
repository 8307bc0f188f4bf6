"""Validity of arrays with known informedness, sign and repeatability."""

from importlib import import_module

import numpy as np
import pytest
from helpers import one_sentence
from hypothesis import given
from hypothesis import strategies as st

from shl.config import FOUNDATIONS, EvalConfig
from shl.measure.evaluation import on_axis
from shl.measure.validity import informedness, permutation_p, validity
from shl.utils.errors import ShlError

LABELS = [name for name in FOUNDATIONS for _ in range(12)]
EXPECTED = {"care": 1, "authority": -1}
CONFIG = EvalConfig(bootstrap=100)
INTENDED = np.array([FOUNDATIONS.index(label) for label in LABELS])
PUSH = np.array([{"care": 1.0, "authority": -1.0}.get(name, 0.0) for name in FOUNDATIONS])


def scores(*, accuracy=3.0, push=0.0, seed=0, factors=(1.0, 1.0, 1.0)):
    """`[84, 3, 7]`: noise of size 0.3, `accuracy` more for the intended foundation, and `push`
    times the axis's signs, times a factor per paraphrase."""
    rng = np.random.default_rng(seed)
    out = 0.3 * rng.standard_normal((len(LABELS), 3, 7)) - 4
    out[np.arange(len(LABELS)), :, INTENDED] += accuracy
    return out + push * PUSH * np.array(factors)[None, :, None]


def validity_of(**changes):
    plus = {"push": 1.0, "seed": 1} | changes.pop("plus", {})
    minus = {"push": -1.0, "seed": 2} | changes.pop("minus", {})
    base, plus, minus = (scores(**changes | own) for own in ({}, plus, minus))
    return validity("demo", base, plus, minus, LABELS, EXPECTED, config=CONFIG)


def test_instrument_that_follows_labels_and_axis_is_valid():
    found = validity_of()
    assert found.valid
    assert (found.informedness, found.informedness_p) == (1.0, 1 / 10_001)
    assert found.split_half > 0.9
    for name, sign in EXPECTED.items():
        each = found.foundations[name]
        assert each.valid
        assert each.informedness == 1.0
        assert len(found.agreement[name]) == 3
        assert all(sign * c > 0.5 for c in found.agreement[name])
        low, high = each.interval
        assert low <= each.contrast <= high
        assert min(sign * low, sign * high) > 0
    assert "informedness 1.00" in found.reason


def test_uninformed_instrument_is_not_valid():
    found = validity_of(accuracy=0.0)
    assert not found.valid
    assert found.informedness_p > 0.05
    assert abs(found.informedness) < 0.15
    assert found.split_half > 0.9  # repeatable all the same
    assert found.reason.startswith(f"informedness is {found.informedness:.2f} (permutation p ")
    assert "persona" not in found.reason


def test_instrument_with_reversed_signs_is_not_valid():
    found = validity_of(plus={"push": -1.0}, minus={"push": 1.0})
    assert not found.valid
    assert found.informedness == 1.0
    assert "the persona contrast of care is -" in found.reason
    assert "must be above 0" in found.reason
    assert not any(each.valid for each in found.foundations.values())


def test_one_paraphrase_with_the_wrong_sign_is_not_valid():
    each = {"factors": (1.0, -0.3, 1.0)}
    found = validity_of(plus=each, minus=each)
    assert not found.valid
    assert np.sign(found.agreement["care"]).tolist() == [1, -1, 1]
    assert found.foundations["care"].contrast > 0  # although the sign over all is right


def test_persona_without_effect_is_not_valid():
    found = validity_of(plus={"push": 0.0}, minus={"push": 0.0})
    assert not found.valid
    assert found.split_half < 0.7
    assert "split-half reliability is" in found.reason
    same = validity("demo", scores(), scores(), scores(), LABELS, EXPECTED, config=CONFIG)
    assert same.split_half == 0.0


def test_vignettes_without_an_answer_are_left_out_and_counted():
    base, plus, minus = scores(), scores(push=1.0, seed=1), scores(push=-1.0, seed=2)
    plus[3, 1, 2], minus[40] = np.nan, np.nan
    found = validity("demo", base, plus, minus, LABELS, EXPECTED, config=CONFIG)
    assert (found.items, found.unscorable) == (82, 2)
    keep = np.delete(np.arange(84), [3, 40])
    rest = [x[keep] for x in (base, plus, minus)]
    again = validity("demo", *rest, [LABELS[i] for i in keep], EXPECTED, config=CONFIG)
    assert again.agreement == found.agreement
    for arrays, labels, message in (
        ((base, plus, np.nan * minus), LABELS, "0 vignettes have scores, at least 4 are needed"),
        ((base, plus, minus), LABELS[1:], "for 83 labels, all must be"),
    ):
        with pytest.raises(ShlError) as error:
            validity("demo", *arrays, labels, EXPECTED)
        assert message in one_sentence(error)


def test_contrast_by_hand():
    base = np.log(np.tile(np.full(7, 1 / 7), (4, 1, 1)))
    care = np.array([0.5, 0.3, 0.5, 0.3])
    plus = np.log(np.stack([np.r_[c, np.full(6, (1 - c) / 6)] for c in care]))[:, None]
    labels = ["care", "social", "care", "social"]
    found = validity("demo", base, plus, base, labels, {"care": 1}, config=CONFIG)
    # mean(0.5, 0.3, 0.5, 0.3) = 0.4 against 1/7
    assert found.agreement["care"][0] == pytest.approx(np.log(0.4 * 7))


def test_calibration_subtracts_the_mean_of_base():
    bias = np.array([5.0, 0, 0, 0, 0, 0, 0])
    arrays = [scores() + bias, scores(push=1.0, seed=1) + bias, scores(push=-1.0, seed=2) + bias]
    plain = validity("demo", *arrays, LABELS, EXPECTED, config=CONFIG)
    calibrated = validity("demo", *arrays, LABELS, EXPECTED, calibrated=True, config=CONFIG)
    assert plain.informedness == 0.0  # care is chosen everywhere
    assert calibrated.informedness == 1.0


def test_informedness_by_hand():
    labels = np.array([0, 0, 0, 1, 1, 2])
    chosen = np.array([0, 0, 1, 1, 0, 2])
    # class 0: 2/3 - 1/3; class 1: 1/2 - 1/4; class 2: 1 - 0
    assert informedness(chosen, labels) == pytest.approx((1 / 3 + 1 / 4 + 1) / 3)
    assert informedness(chosen, labels, 1) == pytest.approx(1 / 4)
    assert informedness(chosen, np.zeros(6, int)) == 0.0
    # Of the 3 orders of (0, 0, 1) one fits fully: p is about 1/3.
    p = permutation_p(np.array([0, 0, 1]), np.array([0, 0, 1]), draws=3000)
    assert p == pytest.approx(1 / 3, abs=0.04)


@given(share=st.floats(0, 1), seed=st.integers(0, 50))
def test_constant_choice_has_no_informedness(share, seed):
    labels = np.repeat([0, 1], [30, 10])
    chosen = (np.random.default_rng(seed).random(40) < share).astype(int)
    assert -1 <= informedness(chosen, labels) <= 1
    assert informedness(np.zeros(40, int), labels) == 0.0


def test_an_axis_that_expects_nothing_is_not_measured():
    # The same readings are valid for an axis that expects the two foundations which move.
    readings = scores(), scores(push=1.0, seed=1), scores(push=-1.0, seed=2)
    assert validity("demo", *readings, LABELS, EXPECTED, config=CONFIG).valid
    found = validity("demo", *readings, LABELS, {}, config=CONFIG)
    assert (found.valid, found.foundations) == (False, {})
    assert found.reason == "the axis expects no foundation to move."
    with pytest.raises(ShlError, match="expects no foundation to move"):
        on_axis(np.ones(7), {})


def test_contrast_of_a_single_vignette_is_not_valid():
    # One vignette says care, the other 83 less by a little: the mean has the right sign in every
    # paraphrase, but a resample without that vignette, of which there are a third, has not.
    base = scores()
    plus = base - 0.01 * PUSH
    plus[0] = base[0] + 6 * PUSH
    found = validity("demo", base, plus, base, LABELS, {"care": 1}, config=CONFIG)
    assert min(found.agreement["care"]) > 0
    low, high = found.foundations["care"].interval
    assert low < 0 < high
    assert not found.foundations["care"].valid
    assert not found.valid


@pytest.mark.parametrize(
    ("name", "value", "valid"),
    [
        ("split_half", 0.7, True),
        ("split_half", 0.69, False),
        ("permutation_p", 0.049, True),
        ("permutation_p", 0.051, False),
    ],
)
def test_thresholds_of_validity(name, value, valid, monkeypatch):
    module = import_module("shl.measure.validity")
    monkeypatch.setattr(module, name, lambda *_, **__: value)
    assert validity_of().valid == valid
