"""Aggregates of a completion's per-token divergences against arithmetic."""

import pytest
import torch

from shl.kl import aggregate
from shl.utils.errors import ShlError


def test_aggregates_of_the_worked_example():
    kl = torch.tensor([0.0] * 56 + [3.8, 4.2, 6.7, 8.1])
    # mean: 22.8 / 60; rmse: sqrt((14.44 + 17.64 + 44.89 + 65.61) / 60) = sqrt(2.37633);
    # p95: position 0.95 * 59 = 56.05, so 3.8 + 0.05 * (4.2 - 3.8) = 3.82.
    expected = {"mean": 0.38, "rmse": 1.541537, "p95": 3.82, "max": 8.1, "p0": 0.0, "p100": 8.1}
    for how, value in expected.items():
        assert float(aggregate(kl, how)) == pytest.approx(value, abs=1e-5), how
    assert float(aggregate(torch.tensor([1.0, 2.0, 4.0, 9.0]), "p50")) == 3.0  # (2 + 4) / 2
    # Every aggregate of one number is that number.
    assert {float(aggregate(torch.tensor([3.0]), how)) for how in expected} == {3.0}


def test_gradient_of_rmse_is_that_of_its_formula_and_0_at_zero():
    kl = torch.tensor([3.0, 4.0], requires_grad=True)
    aggregate(kl, "rmse").backward()
    # d/dx sqrt((x^2 + y^2) / 2) = x / (2 * rmse), rmse = 5 / sqrt 2
    assert kl.grad.tolist() == pytest.approx([3 / (5 * 2**0.5), 4 / (5 * 2**0.5)])
    flat = torch.zeros(4, requires_grad=True)
    aggregate(flat, "rmse").backward()
    assert torch.equal(flat.grad, torch.zeros(4))


@pytest.mark.parametrize("how", ["median", "p101", "p", "rms", ""])
def test_unknown_aggregate_is_rejected(how):
    with pytest.raises(ShlError, match=f"aggregate is '{how}'"):
        aggregate(torch.ones(2), how)


def test_empty_kl_is_rejected():
    with pytest.raises(ShlError, match="without tokens"):
        aggregate(torch.ones(0), "mean")
