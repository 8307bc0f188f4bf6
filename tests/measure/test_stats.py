"""Bootstrap and split-half: paired, repeatable, and right on known numbers."""

import numpy as np
import pytest
from helpers import one_sentence

from shl.measure.stats import bootstrap, split_half
from shl.utils.errors import ShlError


def mean(x):
    return float(x[:, 0].mean())


def difference(x):
    return float(x[:, 0].mean() - x[:, 1].mean())


def test_pairs_stay_together():
    # The second column is the first plus 1: every paired resample differs by exactly 1, however
    # wide the columns are on their own.
    a = np.arange(20.0) ** 2
    pairs = np.stack([a + 1, a], 1)
    assert bootstrap(pairs, difference) == pytest.approx((1.0, 1.0))
    low, high = bootstrap(pairs, mean)
    assert high - low > 50


def test_the_same_seed_gives_the_same_interval_and_another_does_not():
    items = np.random.default_rng(0).normal(size=(30, 1))
    assert bootstrap(items, mean, seed=1) == bootstrap(items, mean, seed=1)
    assert bootstrap(items, mean, seed=1) != bootstrap(items, mean, seed=2)
    items = np.random.default_rng(5).normal(size=(9, 7))
    assert split_half(items, seed=1) == split_half(items, seed=1)
    assert split_half(items, seed=1) != split_half(items, seed=2)


def test_it_covers_the_known_mean_about_as_often_as_it_says():
    # 200 samples of 40 around 3: a 90 % interval misses 20 of them, give or take 3 * sqrt(18).
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        low, high = bootstrap(
            rng.normal(3.0, 2.0, size=(40, 1)), mean, resamples=200, confidence=0.9
        )
        hits += low <= 3.0 <= high
    assert 180 - 13 <= hits <= 180 + 13


def test_the_interval_is_that_of_the_standard_error():
    # The mean of n values of variance 4 has standard error 2 / sqrt(n); 95 % is 3.92 of them wide.
    items = np.random.default_rng(2).normal(0.0, 2.0, size=(400, 1))
    low, high = bootstrap(items, mean, resamples=4000)
    assert high - low == pytest.approx(3.92 * float(items.std()) / 20, rel=0.06)
    assert low < float(items.mean()) < high


def test_too_few_items_are_refused():
    with pytest.raises(ShlError) as error:
        bootstrap(np.empty((0, 1)), mean)
    assert "no items" in one_sentence(error)
    with pytest.raises(ShlError, match="3 items cannot be split"):
        split_half(np.ones((3, 2)))


def test_halves_of_one_profile_agree_and_those_of_noise_do_not():
    profile = np.array([1.0, 5.0, 2.0, 9.0, 4.0, 0.0, 7.0])
    noise = np.random.default_rng(4).normal(size=(40, 7))
    assert split_half(np.tile(profile, (12, 1))) == pytest.approx(1.0)
    assert split_half(profile + 0.1 * noise) > 0.99
    assert split_half(noise) < 0.6


def test_split_half_steps_up_by_spearman_brown():
    # Four rows, two of profile p and two of q, whose halves are {p, p} against {q, q} (one third
    # of the splits) or {p, q} twice (two thirds): r = (1/3) corr(p, q) + (2/3) * 1.
    p, q = np.array([0.0, 1.0, 2.0]), np.array([0.0, 2.0, 1.0])  # corr 1/2
    r = (1 / 3) * 0.5 + 2 / 3
    found = split_half(np.stack([p, p, q, q]), splits=4000)
    assert found == pytest.approx(2 * r / (1 + r), abs=0.01)
