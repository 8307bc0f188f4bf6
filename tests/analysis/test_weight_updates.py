"""Weight updates from their factors, against float64 decompositions of the explicit products."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import one_sentence, random_adapter
from hypothesis import given, settings
from hypothesis import strategies as st

from shl.analysis.weight_updates import (
    UpdateComparison,
    overlap,
    principal_angles,
    product_cosine,
    spectrum,
    update_entries,
)
from shl.utils.errors import ShlError

SIZES = st.integers(1, 9)
KINDS = ["q", "v", "o", "down", "resid"]


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
def test_spectrum_equals_the_decomposition_of_the_dense_product(d_in, d_out, rank, seed, scale):
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


def test_factors_that_are_not_finite_are_rejected():
    a, b = factors(4, 4, 2, 0)
    with pytest.raises(ShlError) as error:
        spectrum(a / 0, b)
    assert "not finite" in one_sentence(error)


def test_principal_angles_are_in_degrees_and_ascend():
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
def test_product_cosine_is_that_of_the_entries(d_in, d_out, rank, other_rank, seed):
    one, other = factors(d_in, d_out, rank, seed), factors(d_in, d_out, other_rank, seed + 1)
    flat = [(b.double() @ a.double()).flatten() for a, b in (one, other)]
    expected = float(torch.cosine_similarity(flat[0], flat[1], dim=0))
    assert product_cosine(one, other) == pytest.approx(expected, abs=1e-9)


def test_cosine_of_random_rotations_has_the_stated_mean_square():
    a, b = (x.double() for x in factors(5, 8, 2, 0))
    squares = []
    for i in range(1000):
        turned = (a @ basis(5, 5, i).T, basis(8, 8, i + 10_000) @ b)
        squares.append(product_cosine((a, b), turned) ** 2)
    # cos^2 has mean 1/40 and a spread of about 0.035, so 1000 draws know it to 0.0011.
    assert sum(squares) / len(squares) == pytest.approx(1 / 40, abs=0.003)


def dense(adapter, name):
    return adapter.scale * (adapter.up[name].double() @ adapter.down[name].double())


def cosines(one, other):
    """Singular values of the product of two column spaces, from dense decompositions."""
    u, v = (torch.linalg.svd(x).U[:, :3] for x in (one, other))
    return torch.linalg.svdvals(u.T @ v)


def test_entries_agree_with_the_explicit_products(model):
    adapters = [random_adapter(model, KINDS, (0, 2), seed=i) for i in range(3)]
    entries = list(update_entries(adapters, top=2))
    assert [e.round for e in entries] == [0] * 10 + [1] * 10 + [2] * 10
    for e in entries:
        update = dense(adapters[e.round], e.site)
        assert e.norm == pytest.approx(float(update.norm()), rel=1e-9)
        values = torch.linalg.svdvals(update)
        assert e.singular_values == pytest.approx(values[:2].tolist(), rel=1e-9)
        shares = values[:3] / values[:3].sum()
        expected = float(torch.exp(-(shares * shares.log()).sum()))
        assert e.effective_rank == pytest.approx(expected, rel=1e-9)
        assert (e.to_first is None) == (e.to_previous is None) == (e.round == 0)
        for pair, index in ((e.to_first, 0), (e.to_previous, e.round - 1)):
            if pair is None:
                continue
            other = dense(adapters[index], e.site)
            flat = torch.cosine_similarity(update.flatten(), other.flatten(), dim=0)
            assert pair.cosine == pytest.approx(float(flat), abs=1e-9)
            written = torch.tensor(pair.written).deg2rad().cos()
            read = torch.tensor(pair.read).deg2rad().cos()
            assert torch.allclose(written.double(), cosines(update, other), atol=1e-5)
            assert torch.allclose(read.double(), cosines(update.T, other.T), atol=1e-5)
            assert pair.written_chance == 3 / update.shape[0]
            assert pair.read_chance == 3 / update.shape[1]
            assert pair.chance == pytest.approx(1.959964 / update.numel() ** 0.5, rel=1e-6)


def test_repeated_update_has_cosine_one_and_negated_update_minus_one(gemma):
    one = random_adapter(gemma, ["q"], (0,))
    other = replace(one, scale=-2 * one.scale)
    entries = list(update_entries([one, one, other]))
    assert entries[1].to_previous.cosine == pytest.approx(1)
    assert entries[2].to_first.cosine == pytest.approx(-1)
    assert entries[2].norm == pytest.approx(2 * entries[0].norm)
    for e in entries[1:]:
        assert e.to_first.written == pytest.approx([0, 0, 0], abs=1e-4)
        assert e.to_first.written_overlap == e.to_first.read_overlap == pytest.approx(1)


def test_overlaps_are_mean_squared_cosines():
    pair = UpdateComparison(0.0, 0.1, (60.0, 90.0), (45.0, 45.0), 0.1, 0.1)
    # cos^2 60 = 1/4 and cos^2 90 = 0; cos^2 45 = 1/2.
    assert pair.written_overlap == pytest.approx(0.125)
    assert pair.read_overlap == pytest.approx(0.5)


def test_site_missing_in_the_first_round_has_no_comparison_to_it(gemma):
    early, late = random_adapter(gemma, ["q"], (0,)), random_adapter(gemma, ["q", "o"], (0,))
    entries = {(e.round, e.site): e for e in update_entries([early, late, late])}
    assert entries[1, "blocks.0.o"].to_previous is None
    assert entries[2, "blocks.0.o"].to_first is None
    assert entries[2, "blocks.0.o"].to_previous is not None
    assert entries[2, "blocks.0.q"].to_first is not None
