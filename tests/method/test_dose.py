"""The dose walk: the ladder, the choice of a rung, and a simulated drop of survival."""

import random

import pytest
from helpers import one_sentence
from hypothesis import given
from hypothesis import strategies as st

from shl.config import DoseConfig
from shl.method.dose import after_batch, ladder, settle, start
from shl.utils.errors import ShlError

FOUR = DoseConfig(rungs=4, kappa_min=0.125, target_survival=0.75)  # 1, 1/2, 1/4, 1/8


def probes(*kept, of=8):
    """Kept counts from the highest dose down."""
    return {kappa: (k, of) for kappa, k in zip(ladder(FOUR), kept, strict=False)}


def test_the_ladder_is_evenly_spaced_in_log_kappa():
    assert ladder(FOUR) == pytest.approx((1.0, 0.5, 0.25, 0.125))
    # 0.2 ** (i / 4): 0.2 ** 0.5 = 0.4472, 0.2 ** 0.25 = 0.6687, 0.2 ** 0.75 = 0.2991
    # 0.13 to the powers 0, 1/5, ..., 1.
    expected = (1.0, 0.66495, 0.44216, 0.29401, 0.19550, 0.13)
    assert ladder(DoseConfig()) == pytest.approx(expected, abs=1e-5)
    assert ladder(DoseConfig(rungs=1)) == (1.0,)
    assert ladder(DoseConfig(walk=False, rungs=7)) == (1.0,)


@pytest.mark.parametrize(
    ("kept", "kappa"),
    [
        # The highest rung at the target: 6 of 8 = 0.75 is the target, 5 of 8 = 0.625 is below.
        ((5, 6, 8, 8), 0.5),
        ((6, 0, 8, 8), 1.0),
        ((0, 5, 5, 6), 0.125),
        # No rung at the target: the best, the lowest dose of equals.
        ((1, 5, 3, 2), 0.5),
        ((1, 5, 5, 2), 0.25),
        ((0, 0, 0, 0), 0.125),
        ((), 1.0),
    ],
)
def test_the_rung_follows_from_the_probes(kept, kappa):
    walk = settle(start(FOUR), probes(*kept))
    assert walk.kappa == pytest.approx(kappa)
    assert walk.at_floor == (kappa == 0.125)


def test_counts_of_several_probes_are_pooled():
    # At kappa 1: 8/8 and then 2/8 make 10/16 = 0.625, below 0.75; at 1/2: 4/8 and 8/8 make 0.75.
    walk = settle(start(FOUR), probes(8, 4))
    assert walk.kappa == 1.0
    walk = settle(walk, probes(2, 8))
    assert walk.kappa == pytest.approx(0.5)
    assert walk.counts == ((10, 16), (12, 16), (0, 0), (0, 0))
    assert [walk.survival(i) for i in range(4)] == [0.625, 0.75, None, None]
    # A batch at that rung is pooled too: (12 + 20) / (16 + 40).
    assert after_batch(walk, 20, 40).counts[1] == (32, 56)


def test_a_batch_steps_down_beyond_two_standard_errors():
    # n = 48: 0.75 - 2 sqrt(0.75 * 0.25 / 48) = 0.75 - 0.125 = 0.625, that is 30 of 48.
    assert after_batch(start(FOUR), 30, 48).kappa == 1.0
    assert after_batch(start(FOUR), 29, 48).kappa == pytest.approx(0.5)
    # The slack shrinks with n: at n = 192 it is 0.0625 and 132 of 192 = 0.6875 is its edge.
    assert after_batch(start(FOUR), 132, 192).kappa == 1.0
    assert after_batch(start(FOUR), 131, 192).kappa == pytest.approx(0.5)
    # Pooled with a probe of 16 of 16, 29 of 32 more make 45 of 48.
    walk = settle(start(FOUR), {1.0: (16, 16)})
    assert after_batch(walk, 14, 32).kappa == 1.0  # 30 of 48
    assert after_batch(walk, 13, 32).kappa == pytest.approx(0.5)


def test_no_step_down_at_the_floor_or_with_the_walk_off():
    walk = settle(start(FOUR), probes(0, 0, 0, 0))
    assert walk.at_floor
    assert after_batch(walk, 0, 40).kappa == walk.kappa
    off = start(DoseConfig(walk=False))
    assert after_batch(off, 0, 40).kappa == 1.0
    assert after_batch(off, 0, 40).counts == ((0, 40),)


@pytest.mark.parametrize(
    ("kappa", "counts", "message"),
    [
        (1.0, (9, 8), "9 kept of 8 generated"),
        (1.0, (-1, 8), "-1 kept of 8 generated"),
        (1.0, (1, 0), "1 kept of 0 generated"),
        (0.3, (4, 8), "0.3 is not on the ladder"),
    ],
)
def test_invalid_counts_are_rejected(kappa, counts, message):
    with pytest.raises(ShlError) as error:
        settle(start(FOUR), {kappa: counts})
    assert message in one_sentence(error)


@given(
    target=st.floats(0, 1),
    rungs=st.integers(1, 7),
    table=st.lists(
        st.tuples(st.integers(0, 12), st.integers(0, 12)).map(lambda t: (min(t), max(t))),
        max_size=7,
    ),
)
def test_the_rung_obeys_the_rule_for_random_probes(target, rungs, table):
    config = DoseConfig(rungs=rungs, target_survival=target)
    kappas = ladder(config)
    probed = dict(zip(kappas, table, strict=False))
    walk = settle(start(config), probed)
    shares = {kappa: kept / n for kappa, (kept, n) in probed.items() if n}
    if not shares:
        assert walk.kappa == 1.0
        return
    at_target = [kappa for kappa, share in shares.items() if share >= target]
    best = max(shares.values())
    equals = [kappa for kappa, share in shares.items() if share == best]
    assert walk.kappa == (max(at_target) if at_target else min(equals))


@pytest.mark.parametrize(("cliff", "rung"), [(1.0, 0), (0.6, 1), (0.3, 2), (0.15, 3), (0.0, 3)])
def test_the_walk_ends_on_the_highest_surviving_rung(cliff, rung):
    # Survival is 0.95 up to the cliff and 0.1 above it; the rungs are 1, 1/2, 1/4, 1/8.
    draw = random.Random(0)

    def survivors(kappa, n):
        return sum(draw.random() < (0.95 if kappa <= cliff else 0.1) for _ in range(n))

    ends = []
    for _ in range(50):
        walk = start(FOUR)
        walk = settle(walk, {k: (survivors(k, 8), 8) for k in walk.kappas})
        for _ in range(6):
            walk = after_batch(walk, survivors(walk.kappa, 40), 40)
        ends.append(walk.rung)
    # A probe of 8 falls below 6 with probability 0.006, and the walk then stays a rung too low.
    assert ends.count(rung) >= 48
    assert min(ends) == rung
