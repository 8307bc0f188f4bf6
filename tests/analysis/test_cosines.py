"""Cosines and norms of vectors by hand, their null distributions, and each round's residuals."""

import pytest
import torch
from helpers import one_sentence, random_adapter

from shl.analysis.cosines import (
    Student,
    bound,
    nuisance_directions,
    random_cosines,
    shuffled_cosines,
    students,
    vector_entries,
)
from shl.hooks.bake import baked
from shl.hooks.vector import SteeringVector
from shl.method.axes import load_axis
from shl.method.extract import extract_vector
from shl.models.activations import residual_at_tag
from shl.models.tokens import Prompt
from shl.utils.errors import ShlError

AXIS = load_axis("care_auth")
LAYERS = [1, 2]


def vector(one, two):
    return SteeringVector({1: torch.tensor(one), 2: torch.tensor(two)}, "tiny", "demo", 4)


VECTORS = [
    vector([3.0, 4.0], [1.0, 0.0]),
    vector([4.0, 3.0], [0.0, 2.0]),
    vector([-6.0, -8.0], [0.0, -3.0]),
]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def isotropic(d):
    """Rows whose covariance is a multiple of the identity."""
    return torch.cat([torch.eye(d), -torch.eye(d)])


def test_norms_and_cosines_by_hand():
    entries = {(e.round, e.layer): e for e in vector_entries(VECTORS)}
    assert [entries[i, 1].norm for i in range(3)] == [5.0, 5.0, 10.0]
    assert [entries[i, 2].norm for i in range(3)] == [1.0, 2.0, 3.0]
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
    noise = [normal(8, 2, seed=seed + i, dtype=torch.float32) for i in range(4)]
    return Student(
        positive={1: noise[0] + 40, 2: noise[1]},
        negative={1: noise[2], 2: noise[3]},
        neutral={1: neutral, 2: neutral},
        healed={1: neutral + torch.tensor([0.3, 0.4]), 2: neutral},
        base={1: neutral, 2: neutral},
    )


def test_students_add_relative_norms_the_shift_and_both_nulls():
    found = [student(10 * i) for i in range(3)]
    entries = {(e.round, e.layer): e for e in vector_entries(VECTORS, found, draws=300, seed=4)}
    assert entries[2, 1].relative_norm == 5.0
    assert entries[1, 1].shift_norm == pytest.approx(0.5)
    # (4, 3) . (0.3, 0.4) / (5 * 0.5)
    assert entries[1, 1].to_shift.value == pytest.approx(0.96)
    assert (entries[1, 2].to_shift, entries[1, 2].shift_norm) == (None, 0)  # nothing moved
    # The null replaces the round's own vector by chance, at that round's student.
    own = found[2]
    states = torch.cat([side - side.mean(0) for side in (own.positive[1], own.negative[1])])
    differences = own.positive[1] - own.negative[1]
    for cosine, reference in (
        (entries[2, 1].to_first, VECTORS[0].directions[1]),
        (entries[2, 1].to_previous, VECTORS[1].directions[1]),
        (entries[2, 1].to_shift, torch.tensor([0.3, 0.4])),
    ):
        random = bound(random_cosines(reference, states, draws=300, seed=4))
        shuffled = bound(shuffled_cosines(reference, differences, draws=300, seed=4))
        assert (cosine.random, cosine.shuffled) == pytest.approx((random, shuffled), abs=1e-6)


def test_cosines_to_nuisance_directions_by_hand_with_the_nulls_of_the_round():
    other = {"valence": vector([0.0, -2.0], [0.0, 0.0])}
    found = [student(10 * i) for i in range(3)]
    more = {"draws": 300, "seed": 4}
    entries = {(e.round, e.layer): e for e in vector_entries(VECTORS, found, other, **more)}
    # (3, 4), (4, 3) and (-6, -8) against (0, -2).
    values = [entries[i, 1].to_nuisance["valence"].value for i in range(3)]
    assert values == pytest.approx([-0.8, -0.6, 0.8])
    assert entries[1, 2].to_nuisance == {"valence": None}
    own, reference = found[1], torch.tensor([0.0, -2.0])
    states = torch.cat([side - side.mean(0) for side in (own.positive[1], own.negative[1])])
    cosine = entries[1, 1].to_nuisance["valence"]
    assert cosine.random == bound(random_cosines(reference, states, **more))
    assert cosine.shuffled == bound(shuffled_cosines(reference, own.differences(1), **more))
    plain = list(vector_entries(VECTORS, None, other))
    assert plain[0].to_nuisance["valence"].random is None
    assert next(vector_entries(VECTORS)).to_nuisance == {}


def test_nuisance_directions_are_those_of_base(gemma):
    with baked(gemma, [random_adapter(gemma, ["down"], (0,), size=0.05)]):
        found = nuisance_directions(gemma, AXIS, LAYERS, contexts=3)
    assert list(found) == ["valence", "formality", "length"]
    for name, v in found.items():
        base = extract_vector(gemma, load_axis(name), LAYERS, contexts=3)
        assert all(torch.equal(v.directions[i], base.directions[i]) for i in LAYERS)
    own = nuisance_directions(gemma, load_axis("formality"), LAYERS, contexts=3)
    assert list(own) == ["valence", "length"]


def test_zero_direction_has_a_norm_and_no_cosine():
    zero = vector([0.0, 0.0], [1.0, 1.0])
    entries = {(e.round, e.layer): e for e in vector_entries([zero, VECTORS[0], zero])}
    assert entries[0, 1].norm == 0.0
    assert [entries[i, 1].to_first for i in range(3)] == [None] * 3  # the first is zero
    assert [entries[i, 1].to_previous for i in range(3)] == [None] * 3
    assert entries[2, 2].to_first.value == pytest.approx(1)


@pytest.mark.parametrize("d", [3, 10, 100])
def test_isotropic_random_cosines_have_mean_square_one_over_d(d):
    draws = 20_000
    cosines = random_cosines(normal(d), isotropic(d) + 5.0, draws=draws)
    # cos^2 is Beta(1/2, (d-1)/2): variance 2 (d-1) / (d^2 (d+2)).
    error = (2 * (d - 1) / (d**2 * (d + 2)) / draws) ** 0.5
    assert float((cosines**2).mean()) == pytest.approx(1 / d, abs=4 * error)
    assert float(cosines.mean()) == pytest.approx(0, abs=4 / (d * draws) ** 0.5)
    if d == 3:  # uniform on -1 to 1 (Archimedes), so 95 % of the sizes lie below 0.95
        assert bound(cosines) == pytest.approx(0.95, abs=0.007)


def test_random_directions_have_the_covariance_of_the_states():
    states = isotropic(3) * torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64)
    # x / |x| with x ~ N(0, diag(9, 1)): tan of its angle is |z2| / (3 |z1|), a Cauchy over 3, so
    # P(|cos to the first axis| > c) = 2/pi arctan(3 tan(arccos c)).
    cosines = random_cosines(torch.tensor([1.0, 0.0, 0.0]), states, draws=20_000).abs()
    c = torch.tensor(0.9, dtype=torch.float64)
    expected = float(2 / torch.pi * torch.atan(3 * torch.tan(torch.acos(c))))
    assert float((cosines > c).double().mean()) == pytest.approx(expected, abs=0.015)
    assert bound(random_cosines(torch.tensor([0.0, 0.0, 1.0]), states)) < 1e-9


@pytest.mark.parametrize("n", [2, 6, 7, 32])
def test_shuffling_removes_the_mean_difference_exactly(n):
    reference, noise = normal(5), normal(n, 5, seed=1)
    plain = shuffled_cosines(reference, noise, draws=200)
    shifted = shuffled_cosines(reference, noise + 50 * reference, draws=200)
    assert torch.allclose(plain, shifted, atol=1e-9)


def test_shuffled_vector_is_half_the_contexts_minus_the_other_half():
    noise = normal(4, 6)
    reference = normal(6, seed=2)
    expected = set()
    for first in range(1, 4):  # context 0 keeps its labels, and so does one other
        signs = -torch.ones(4, dtype=torch.float64)
        signs[[0, first]] = 1
        cosine = float(torch.cosine_similarity(signs @ noise, reference, dim=0))
        expected |= {round(cosine, 9), round(-cosine, 9)}
    found = shuffled_cosines(reference, noise, draws=300)
    assert {round(float(c), 9) for c in found} == expected


@pytest.mark.parametrize(
    ("null", "reference", "rows", "message"),
    [
        (random_cosines, torch.zeros(3), normal(4, 3), "is 0"),
        (shuffled_cosines, torch.zeros(3), normal(4, 3), "is 0"),
        (random_cosines, torch.ones(3), normal(1, 3), "at least 2"),
        (shuffled_cosines, torch.ones(3), normal(1, 3), "at least 2"),
        (random_cosines, torch.ones(3), torch.ones(4, 3), "do not differ"),
        (shuffled_cosines, torch.ones(3), torch.ones(4, 3), "all alike"),
    ],
)
def test_degenerate_nulls_are_rejected(null, reference, rows, message):
    with pytest.raises(ShlError) as error:
        null(reference, rows)
    assert message in one_sentence(error)


def test_students_enter_with_earlier_adapters_and_are_healed_by_their_own(model):
    adapters = [random_adapter(model, ["q", "down"], (0, 1), seed=i, size=0.05) for i in range(2)]
    found = students(model, AXIS, [[a] for a in adapters], LAYERS, contexts=3, batch_size=2)
    plain = [Prompt(context) for context in AXIS.contexts[:3]]
    base = residual_at_tag(model, plain, LAYERS)
    for index, student in enumerate(found):
        with baked(model, adapters[:index]):
            vector = extract_vector(model, AXIS, LAYERS, contexts=3)
            before = residual_at_tag(model, plain, LAYERS)
        with baked(model, adapters[: index + 1]):
            after = residual_at_tag(model, plain, LAYERS)
        for layer in LAYERS:
            mean = student.differences(layer).mean(0)
            assert torch.allclose(mean, vector.directions[layer], atol=1e-5)
            assert torch.allclose(student.neutral[layer], before[layer], atol=1e-5)
            expected = (after[layer] - base[layer]).mean(0)
            assert torch.allclose(student.shift(layer), expected, atol=1e-5)
    assert (found[0].shift(2) - found[1].shift(2)).norm() > 0.1


def test_students_ignore_hooks_of_the_caller(gemma):
    adapter = random_adapter(gemma, ["down"], (0,), size=0.05)
    (plain,) = students(gemma, AXIS, [[adapter]], [3], contexts=2)
    with baked(gemma, [random_adapter(gemma, ["up"], (1,), seed=5)]):
        (same,) = students(gemma, AXIS, [[adapter]], [3], contexts=2)
    assert torch.equal(plain.shift(3), same.shift(3))
