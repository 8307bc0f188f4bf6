"""The cases of the GPU bench compute equal gradients (small, on the CPU, in float32)."""

import pytest
import torch

from experiments.bench import kernel_gpu
from experiments.bench.measure import Timing
from shl.kl.divergence import naive_kl_and_nll

SHAPE = (6, 8, 1500)


@pytest.fixture
def cases(monkeypatch):
    # torch.compile takes a C++ compiler on CPUs, which not every machine has.
    monkeypatch.setattr(torch, "compile", lambda f: f)
    return kernel_gpu.cases(*SHAPE, "cpu", torch.float32)


def test_every_case_computes_the_same_gradient(cases):
    expected = cases["naive"]()
    for name in ("compiled naive", "torch sweep", "fused"):
        torch.testing.assert_close(cases[name](), expected, rtol=1e-4, atol=1e-6)
    closed, quantile = cases["lazy closed"](), cases["lazy p95"]()
    assert not torch.allclose(closed, expected, atol=1e-4)
    assert not torch.allclose(quantile, expected, atol=1e-4)


def test_gradient_below_tau_is_that_of_the_nll():
    h = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    unembed, targets = torch.randn(4, 9), torch.arange(3)

    def kernel(x):
        return naive_kl_and_nll(x, h + 1, unembed, targets)

    x = h.clone().requires_grad_()
    (grad,) = torch.autograd.grad(kernel(x)[1].mean(), x)
    torch.testing.assert_close(kernel_gpu.gradient(kernel, h, "rmse", 1e9), grad)


def test_rows_are_ratios_of_medians_or_not_measured():
    rows = kernel_gpu.unmeasured("no CUDA device here")
    assert len(rows) == len(kernel_gpu.TARGETS) + 1
    assert {row.cells()[1] for row in rows} == {"not measured"}
    names = ["naive", "compiled naive", "torch sweep", "fused", "lazy closed", "lazy p95"]
    t = {name: Timing((2.0, 2.0 + i, 9.0), (1.0,), 100.0 * (i + 1)) for i, name in enumerate(names)}
    rows_of = {row.what: row for row in kernel_gpu.rows_of(t)}
    assert rows_of["GPU: naive / fused"].ratio == 2.0 / 5.0
    assert rows_of["GPU: naive / lazy closed"].ratio == 2.0 / 6.0
    assert rows_of["GPU: Liger / fused"].ratio is None
    assert rows_of["GPU: extra memory, fused"].ratio == 4.0
