"""Weight updates against explicit products in float64."""

from dataclasses import replace

import pytest
import torch
from helpers import random_adapter

from shl.analysis.weight_updates import UpdateComparison, overlap, update_entries

KINDS = ["q", "v", "o", "down", "resid"]


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


def test_an_update_repeated_is_at_no_angle_and_one_negated_is_opposite(gemma):
    one = random_adapter(gemma, ["q"], (0,))
    other = replace(one, scale=-2 * one.scale)
    entries = list(update_entries([one, one, other]))
    assert entries[1].to_previous.cosine == pytest.approx(1)
    assert entries[2].to_first.cosine == pytest.approx(-1)
    assert entries[2].norm == pytest.approx(2 * entries[0].norm)
    for e in entries[1:]:
        assert e.to_first.written == pytest.approx([0, 0, 0], abs=1e-4)
        assert e.to_first.written_overlap == e.to_first.read_overlap == pytest.approx(1)


def test_overlaps_of_unrelated_updates_lie_about_chance():
    pair = UpdateComparison(0.0, 0.1, (60.0, 90.0), (45.0, 45.0), 0.1, 0.1)
    # cos^2 60 = 1/4 and cos^2 90 = 0; cos^2 45 = 1/2.
    assert pair.written_overlap == pytest.approx(0.125)
    assert pair.read_overlap == pytest.approx(0.5)
    assert overlap(torch.tensor([])) == 0


def test_a_site_that_only_later_rounds_have_has_no_first(gemma):
    early, late = random_adapter(gemma, ["q"], (0,)), random_adapter(gemma, ["q", "o"], (0,))
    entries = {(e.round, e.site): e for e in update_entries([early, late, late])}
    assert entries[1, "blocks.0.o"].to_previous is None
    assert entries[2, "blocks.0.o"].to_first is None
    assert entries[2, "blocks.0.o"].to_previous is not None
    assert entries[2, "blocks.0.q"].to_first is not None
