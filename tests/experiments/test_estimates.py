"""Intervals of shares against published numbers and counted coverage; ranks against hand counts."""

import numpy as np
import pytest

from experiments.questions.estimates import (
    EXACT,
    SHARES,
    Answer,
    Estimate,
    deciding,
    difference,
    sentence,
    spearman,
    wilson,
)


def column(kept, total):
    return [i < kept for i in range(total)]


def test_wilson():
    # 16 / (16 + 1.96^2): all kept is no certainty.
    assert wilson(16, 16) == pytest.approx((16 / 19.8415, 1.0), abs=1e-5)
    # At 80 % z is 1.28155: 16 / (16 + 1.6424).
    assert wilson(16, 16, 0.8)[0] == pytest.approx(16 / 17.6424, abs=1e-5)


def test_a_difference_is_newcombes():
    # Newcombe 1998 (interval estimation for the difference), example a, method 10: 56/70 - 48/80.
    value, low, high = difference(column(56, 70), column(48, 80))
    assert value == pytest.approx(0.2)
    assert (low, high) == pytest.approx((0.0524, 0.3339), abs=1e-4)


def test_a_factor_scales_the_other_share():
    # With a factor of 0 the other share does not matter: Wilson's own limits.
    value, low, high = difference(column(12, 16), column(3, 7), factor=0.0)
    assert (value, low, high) == pytest.approx((0.75, *wilson(12, 16)))
    assert difference(column(16, 16), column(16, 16), factor=0.97)[0] == pytest.approx(0.03)


def test_pairs_that_agree_narrow_it_and_it_covers_about_as_often_as_it_says():
    same = column(8, 16)
    wide, narrow = (difference(same, same, paired=p) for p in (False, True))
    assert narrow[2] - narrow[1] < 0.2 * (wide[2] - wide[1])
    # Shares of 0.7 and 0.5 that share three quarters of their draws; 400 tables of 30 pairs miss
    # 0.2 in 20 of them, give or take 3 * sqrt(19).
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        u, v = rng.random(30), rng.random(30)
        v = np.where(rng.random(30) < 0.75, u, v)
        _, low, high = difference((u < 0.7).tolist(), (v < 0.5).tolist(), paired=True)
        hits += low <= 0.2 <= high
    assert 380 - 13 <= hits <= 400


def test_spearman_by_hand():
    # Ranks 1.5 1.5 3 and 1 2 3: covariance (0.5 + 0 + 1) / 3, variances 1.5 / 3 and 2 / 3.
    a, b = np.array([5.0, 5.0, 6.0]), np.array([1.0, 7.0, np.inf])
    assert spearman(a, b) == pytest.approx(0.5 / (0.5 * 2 / 3) ** 0.5)
    assert spearman(a, -b) == pytest.approx(-0.5 / (1 / 3) ** 0.5)
    assert spearman(np.ones(3), b) == spearman(a, np.full(3, np.inf)) == 0.0


def made(name, value, low, high, threshold=0.0, **more):
    return Estimate(name, (value, low, high), threshold, SHARES, **more)


# Distance to the threshold over the interval's lower half: 0.5 / 0.25 = 2 and 0.4 / 0.1 = 4; the
# same distance in other units: 50 / 20 = 2.5; without an interval there is no such unit.
WIDE, NARROW = made("wide", 0.5, 0.25, 0.75), made("narrow", 0.4, 0.3, 0.5)
LARGE, SURE = made("large", 51.0, 31.0, 99.0, 1.0), made("sure", 0.1, 0.1, 0.1)
QUIET = made("quiet", 0.3, 0.01, 0.6, quiet=True)  # 0.3 / 0.29 = 1.03
FAILS, FAILS_TOO = made("fails", -0.5, -0.6, -0.4), made("fails too", -0.1, -0.3, 0.0)
OPEN, UNKNOWN = made("open", 0.1, -0.1, 0.3), Estimate("unknown", None, 0.0, EXACT, 2, "why not")
DOUBTED = made("doubted", 0.5, 0.4, 0.6, trait=True, doubt=True)
INFINITE = Estimate("infinite", (np.inf, 1.0, np.inf), 0.0, SHARES)


def test_margin_by_hand():
    found = [e.margin for e in (WIDE, NARROW, LARGE, SURE, QUIET, UNKNOWN, INFINITE)]
    assert found == pytest.approx([2.0, 4.0, 2.5, np.inf, 0.3 / 0.29, np.inf, np.inf])


@pytest.mark.parametrize(
    ("outcome", "estimates", "expected"),
    [
        # All hold: the one closest to its threshold.
        ("yes", [SURE, NARROW, LARGE, WIDE, INFINITE], WIDE),
        ("yes", [SURE, INFINITE], SURE),
        ("yes", [QUIET, NARROW, WIDE], WIDE),
        ("yes", [QUIET], QUIET),
        # Not all have to hold: the first that does.
        ("yes", [FAILS, NARROW, WIDE], NARROW),
        # The first that fails, or is open, however close.
        ("no", [WIDE, OPEN, FAILS, FAILS_TOO], FAILS),
        ("no", [FAILS_TOO, FAILS], FAILS_TOO),
        ("undecided", [WIDE, UNKNOWN, OPEN], UNKNOWN),
        ("undecided", [WIDE, DOUBTED, OPEN], DOUBTED),
        # Something else decides.
        ("no", [WIDE, OPEN], None),
        ("info", [WIDE], None),
        ("yes", [], None),
    ],
)
def test_deciding_estimate(outcome, estimates, expected):
    assert deciding(outcome, estimates) is expected
    assert Answer("k", "q?", outcome, "", {}, {}, tuple(estimates)).deciding is expected
    assert str(expected or "")[1:] in sentence(outcome, estimates)


def test_cells_and_text_of_an_estimate():
    e = made("shift", 0.5, 0.25, 0.75, 0.05, round=1, unit=" nats", note="16 of 16")
    assert e.cells == ("shift (round 1)", "0.50 nats", "0.25 to 0.75", "> 0.050")
    assert str(e) == "shift (round 1) 0.50 nats (0.25 to 0.75; 16 of 16), must be above 0.050"
    counted = Estimate("count", (3.0, 2.0, 4.0), -0.2, EXACT)
    assert counted.cells == ("count", "3.00", "", "> -0.20")
    assert str(counted) == "count 3.00, must be above -0.20"
    assert UNKNOWN.cells == ("unknown (round 2): why not", "", "", "")
    assert str(INFINITE) == INFINITE.cells[0] == "infinite: not known"
