"""The nulls against what is known of random directions, and against their own definition."""

import pytest
import torch
from helpers import one_sentence

from shl.analysis.cosines import bound, random_cosines, shuffled_cosines
from shl.utils.errors import ShlError


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def isotropic(d):
    """Rows whose covariance is a multiple of the identity."""
    return torch.cat([torch.eye(d), -torch.eye(d)])


@pytest.mark.parametrize("d", [3, 10, 100])
def test_isotropic_directions_have_a_mean_square_of_one_over_d(d):
    draws = 20_000
    cosines = random_cosines(normal(d), isotropic(d) + 5.0, draws=draws)
    # cos^2 is Beta(1/2, (d-1)/2): variance 2 (d-1) / (d^2 (d+2)).
    error = (2 * (d - 1) / (d**2 * (d + 2)) / draws) ** 0.5
    assert float((cosines**2).mean()) == pytest.approx(1 / d, abs=4 * error)
    assert float(cosines.mean()) == pytest.approx(0, abs=4 / (d * draws) ** 0.5)
    if d == 3:  # uniform on -1 to 1 (Archimedes), so 95 % of the sizes lie below 0.95
        assert bound(cosines) == pytest.approx(0.95, abs=0.007)


def test_directions_have_the_covariance_of_the_states():
    scales = torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64)
    states = isotropic(3) * scales
    # x / |x| with x ~ N(0, diag(9, 1)): tan of its angle is |z2| / (3 |z1|), a Cauchy over 3, so
    # P(|cos to the first axis| > c) = 2/pi arctan(3 tan(arccos c)).
    cosines = random_cosines(torch.tensor([1.0, 0.0, 0.0]), states, draws=20_000).abs()
    c = torch.tensor(0.9, dtype=torch.float64)
    expected = float(2 / torch.pi * torch.atan(3 * torch.tan(torch.acos(c))))
    assert float((cosines > c).double().mean()) == pytest.approx(expected, abs=0.015)
    assert bound(random_cosines(torch.tensor([0.0, 0.0, 1.0]), states)) < 1e-9


@pytest.mark.parametrize("n", [2, 6, 7, 32])
def test_shuffling_takes_the_mean_difference_out_exactly(n):
    reference, noise = normal(5), normal(n, 5, seed=1)
    mean = 50 * reference
    plain = shuffled_cosines(reference, noise, draws=200)
    assert torch.allclose(plain, shuffled_cosines(reference, noise + mean, draws=200), atol=1e-9)


def test_a_shuffled_vector_is_half_the_contexts_minus_the_other_half():
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


@pytest.mark.parametrize("null", [random_cosines, shuffled_cosines])
@pytest.mark.parametrize(
    ("reference", "rows"),
    [
        (torch.zeros(3), normal(4, 3)),
        (torch.ones(3), normal(1, 3)),
        (torch.ones(3), torch.ones(4, 3)),
    ],
)
def test_what_has_no_null_is_refused(null, reference, rows):
    with pytest.raises(ShlError) as error:
        null(reference, rows)
    assert any(
        said in one_sentence(error) for said in ("is 0", "at least 2", "do not differ", "all alike")
    )
