"""Cosines and norms of vectors by hand, and which null stands beside which."""

import pytest
import torch

from shl.analysis.cosines import (
    Student,
    bound,
    random_cosines,
    shuffled_cosines,
    vector_entries,
)
from shl.hooks.vector import SteeringVector


def vector(**directions):
    layers = {int(key[1:]): torch.tensor(v) for key, v in directions.items()}
    return SteeringVector(layers, "tiny", "demo", 4)


VECTORS = [
    vector(l1=[3.0, 4.0], l2=[1.0, 0.0]),
    vector(l1=[4.0, 3.0], l2=[0.0, 2.0]),
    vector(l1=[-6.0, -8.0], l2=[0.0, -3.0]),
]


def noise(seed, n=8):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))


def test_norms_and_cosines_are_those_of_the_arithmetic():
    entries = {(e.round, e.layer): e for e in vector_entries(VECTORS)}
    assert {key: e.norm for key, e in entries.items()} == {
        **{(0, 1): 5.0, (1, 1): 5.0, (2, 1): 10.0},
        **{(0, 2): 1.0, (1, 2): 2.0, (2, 2): 3.0},
    }
    # (3, 4) . (4, 3) / 25 = 0.96; (4, 3) . (-6, -8) / 50 = -0.96.
    first = {key: round(e.to_first.value, 6) for key, e in entries.items()}
    assert [first[i, 1] for i in range(3)] == [1.0, 0.96, -1.0]
    assert [first[i, 2] for i in range(3)] == [1.0, 0.0, 0.0]
    assert entries[0, 1].to_previous is None
    assert entries[1, 1].to_previous.value == pytest.approx(0.96)
    assert entries[2, 1].to_previous.value == pytest.approx(-0.96)
    assert entries[2, 2].to_previous.value == pytest.approx(-1)
    for e in entries.values():
        assert (e.relative_norm, e.shift_norm, e.to_shift, e.to_first.random) == (None,) * 4
        assert e.to_first.beyond_chance is None


def student(seed):
    """Residuals of norm 2 without persona; the round moves them by (0.3, 0.4)."""
    neutral = torch.tensor([[2.0, 0.0], [0.0, -2.0]]).repeat(4, 1)
    return Student(
        positive={1: noise(seed) + 40, 2: noise(seed + 1)},
        negative={1: noise(seed + 2), 2: noise(seed + 3)},
        neutral={1: neutral, 2: neutral},
        healed={1: neutral + torch.tensor([0.3, 0.4]), 2: neutral},
        base={1: neutral, 2: neutral},
    )


def test_with_students_come_relative_norms_the_shift_and_both_nulls():
    found = [student(10 * i) for i in range(3)]
    entries = {(e.round, e.layer): e for e in vector_entries(VECTORS, found, draws=300, seed=4)}
    assert entries[2, 1].relative_norm == 5.0
    assert entries[1, 1].shift_norm == pytest.approx(0.5)
    # (4, 3) . (0.3, 0.4) / (5 * 0.5)
    assert entries[1, 1].to_shift.value == pytest.approx(0.96)
    assert (entries[1, 2].to_shift, entries[1, 2].shift_norm) == (None, 0)  # nothing moved
    # The null replaces the round's own vector by chance, at that round's student.
    own = found[2]
    sides = [side - side.mean(0) for side in (own.positive[1], own.negative[1])]
    states = torch.cat(sides)
    differences = own.positive[1] - own.negative[1]
    for cosine, reference in (
        (entries[2, 1].to_first, VECTORS[0].directions[1]),
        (entries[2, 1].to_previous, VECTORS[1].directions[1]),
        (entries[2, 1].to_shift, torch.tensor([0.3, 0.4])),
    ):
        assert cosine.random == pytest.approx(
            bound(random_cosines(reference, states, draws=300, seed=4)), abs=1e-6
        )
        assert cosine.shuffled == pytest.approx(
            bound(shuffled_cosines(reference, differences, draws=300, seed=4)), abs=1e-6
        )


def test_a_direction_of_zero_has_a_norm_and_no_cosine():
    zero = vector(l1=[0.0, 0.0], l2=[1.0, 1.0])
    entries = {(e.round, e.layer): e for e in vector_entries([zero, VECTORS[0], zero])}
    assert entries[0, 1].norm == 0.0
    assert [entries[i, 1].to_first for i in range(3)] == [None] * 3  # the first has no direction
    assert [entries[i, 1].to_previous for i in range(3)] == [None] * 3
    assert entries[2, 2].to_first.value == pytest.approx(1)
