"""Spectra and angles from the factors, against float64 decompositions of the explicit products."""

import math

import pytest
import torch
from helpers import one_sentence
from hypothesis import given, settings
from hypothesis import strategies as st

from shl.analysis.weight_updates import (
    effective_rank,
    overlap,
    principal_angles,
    product_cosine,
    spectrum,
)
from shl.utils.errors import ShlError

SIZES = st.integers(1, 9)


def factors(d_in, d_out, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rank, d_in, generator=generator),
        torch.randn(d_out, rank, generator=generator),
    )


def basis(d, k, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64)).Q


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, SIZES, st.integers(0, 99), st.sampled_from([0.5, 2.0, -1.0]))
def test_equals_the_decomposition_of_the_dense_product(d_in, d_out, rank, seed, scale):
    a, b = factors(d_in, d_out, rank, seed)
    dense = scale * (b.double() @ a.double())
    expected = torch.linalg.svdvals(dense)[: min(rank, d_in, d_out)]
    got = spectrum(a, b, scale)
    assert torch.allclose(got.values, expected, atol=1e-12)
    assert torch.allclose(got.left @ got.values.diag() @ got.right, dense, atol=1e-12)
    eye = torch.eye(len(got.values), dtype=torch.float64)
    assert torch.allclose(got.left.T @ got.left, eye, atol=1e-12)
    assert torch.allclose(got.right @ got.right.T, eye, atol=1e-12)
    assert got.norm == pytest.approx(float(dense.norm()), rel=1e-12)
    shares = expected / expected.sum()
    assert got.effective_rank == pytest.approx(
        math.exp(-sum(float(p) * math.log(float(p)) for p in shares)), rel=1e-9
    )


def test_directions_without_a_size_are_left_out():
    a, b = factors(6, 5, 3, 0)
    b[:, 2] = b[:, 1]
    a[2] = -a[1]  # the last two of three cancel
    assert len(spectrum(a, b).values) == 1
    nothing = spectrum(a, torch.zeros(5, 3))
    assert (len(nothing.values), nothing.norm, nothing.effective_rank) == (0, 0.0, 0.0)
    assert (nothing.left.shape, nothing.right.shape) == ((5, 0), (0, 6))
    assert overlap(principal_angles(nothing.left, nothing.left)) == 0.0


def test_the_effective_rank_of_equal_values_is_their_number():
    assert effective_rank(torch.full((7,), 0.3)) == pytest.approx(7)
    # Shares 1/2, 1/4, 1/4: entropy 1.5 log 2, so 2^1.5.
    assert effective_rank(torch.tensor([2.0, 1.0, 1.0])) == pytest.approx(2**1.5)


def test_angles_are_in_degrees_from_the_smallest():
    # The plane of x and y against that of x and a direction 30 degrees off y.
    one, turn = torch.eye(4, dtype=torch.float64)[:, :2], math.radians(30)
    other = one.clone()
    other[1, 1], other[2, 1] = math.cos(turn), math.sin(turn)
    assert principal_angles(one, other).tolist() == pytest.approx([0, 30], abs=1e-6)
    # One direction has one angle to a plane.
    assert principal_angles(one[:, :1], other).tolist() == pytest.approx([0], abs=1e-6)


def test_random_subspaces_overlap_by_k_over_d():
    d, k = 40, 4
    shares = [
        overlap(principal_angles(basis(d, k, i), basis(d, k, i + 10_000))) for i in range(400)
    ]
    # The mean of 400 draws whose spread is about 0.025: within 4 standard errors of 0.1.
    assert sum(shares) / len(shares) == pytest.approx(k / d, abs=0.005)


@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, SIZES, SIZES, st.integers(0, 99))
def test_the_cosine_of_two_updates_is_that_of_their_entries(d_in, d_out, rank, other_rank, seed):
    one, other = factors(d_in, d_out, rank, seed), factors(d_in, d_out, other_rank, seed + 1)
    flat = [(b.double() @ a.double()).flatten() for a, b in (one, other)]
    expected = float(torch.cosine_similarity(flat[0], flat[1], dim=0))
    assert product_cosine(one, other) == pytest.approx(expected, abs=1e-9)


def test_an_update_turned_at_random_has_the_stated_mean_square():
    a, b = factors(5, 8, 2, 0)
    squares = []
    for i in range(3000):
        turned = (a.double() @ basis(5, 5, i).T, basis(8, 8, i + 10_000) @ b.double())
        squares.append(product_cosine((a.double(), b.double()), turned) ** 2)
    # cos^2 has mean 1/40 and a spread of about 0.035, so 3000 draws know it to 0.0006.
    assert sum(squares) / len(squares) == pytest.approx(1 / 40, abs=0.003)


def test_what_has_no_spectrum_is_refused():
    a, b = factors(4, 4, 2, 0)
    with pytest.raises(ShlError) as error:
        spectrum(a / 0, b)
    assert "not finite" in one_sentence(error)
    with pytest.raises(ShlError) as error:
        principal_angles(2 * basis(4, 2, 0), basis(4, 2, 1))
    assert "orthonormal" in one_sentence(error)
