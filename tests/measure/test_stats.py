"""Bootstrap and split-half: paired, repeatable, and correct on known numbers."""

from functools import partial

import numpy as np
import pytest
from helpers import one_sentence

from shl.measure.stats import bootstrap, split_half
from shl.utils.errors import ShlError


def mean(x):
    return float(x[:, 0].mean())


def difference(x):
    return float(x[:, 0].mean() - x[:, 1].mean())


def test_bootstrap_keeps_pairs_together():
    # The second column is the first plus 1: every paired resample differs by exactly 1, however
    # wide the columns are on their own.
    a = np.arange(20.0) ** 2
    pairs = np.stack([a + 1, a], 1)
    assert bootstrap(pairs, difference) == pytest.approx((1.0, 1.0))
    low, high = bootstrap(pairs, mean)
    assert high - low > 50


@pytest.mark.parametrize("statistic", [partial(bootstrap, statistic=mean), split_half])
def test_result_depends_on_the_seed_only(statistic):
    items = np.random.default_rng(5).normal(size=(9, 7))
    assert statistic(items, seed=1) == statistic(items, seed=1)
    assert statistic(items, seed=1) != statistic(items, seed=2)


def test_bootstrap_has_the_stated_coverage():
    # 200 samples of 40 around 3: a 90 % interval misses 20 of them, give or take 3 * sqrt(18).
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        sample = rng.normal(3.0, 2.0, size=(40, 1))
        low, high = bootstrap(sample, mean, resamples=200, confidence=0.9)
        hits += low <= 3.0 <= high
    assert 180 - 13 <= hits <= 180 + 13


def test_bootstrap_interval_is_that_of_the_standard_error():
    # The mean of n values of variance 4 has standard error 2 / sqrt(n); 95 % is 3.92 of them wide.
    items = np.random.default_rng(2).normal(0.0, 2.0, size=(400, 1))
    low, high = bootstrap(items, mean, resamples=4000)
    assert high - low == pytest.approx(3.92 * float(items.std()) / 20, rel=0.06)
    assert low < float(items.mean()) < high


def test_too_few_items_are_rejected():
    with pytest.raises(ShlError) as error:
        bootstrap(np.empty((0, 1)), mean)
    assert "no items" in one_sentence(error)
    with pytest.raises(ShlError, match="3 items cannot be split"):
        split_half(np.ones((3, 2)))


def test_split_half_is_high_for_one_profile_and_low_for_noise():
    profile = np.array([1.0, 5.0, 2.0, 9.0, 4.0, 0.0, 7.0])
    noise = np.random.default_rng(4).normal(size=(40, 7))
    assert split_half(np.tile(profile, (12, 1))) == pytest.approx(1.0)
    assert split_half(profile + 0.1 * noise) > 0.99
    assert split_half(noise) < 0.6


def test_split_half_is_corrected_by_spearman_brown():
    # Four rows, two of profile p and two of q, whose halves are {p, p} against {q, q} (one third
    # of the splits) or {p, q} twice (two thirds): r = (1/3) corr(p, q) + (2/3) * 1.
    p, q = np.array([0.0, 1.0, 2.0]), np.array([0.0, 2.0, 1.0])  # corr 1/2
    r = (1 / 3) * 0.5 + 2 / 3
    found = split_half(np.stack([p, p, q, q]), splits=4000)
    assert found == pytest.approx(2 * r / (1 + r), abs=0.01)
