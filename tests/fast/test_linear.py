"""Products through oneDNN against float64 and against torch's own function."""

import pytest
import torch
from torch.nn import functional

from shl.fast.linear import ONEDNN, onednn_linear
from shl.kl import log_probs_at, logsumexp, reverse_kl_and_nll
from shl.kl.divergence import naive_kl_and_nll

LAYOUTS = {
    "rows": lambda w: w,
    "columns": lambda w: w.T.contiguous().T,
    "some rows": lambda w: torch.cat([w, w, w])[len(w) : 2 * len(w)],
    "some columns": lambda w: torch.cat([w, w, w]).T[:, len(w) : 2 * len(w)].T,
}


def draws(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.fixture
def calls(monkeypatch):
    """How often oneDNN's operator is reached."""
    seen, real = [], torch.ops.mkldnn._linear_pointwise

    def count(*args):
        seen.append(args[1].shape)
        return real(*args)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", count)
    return seen


needs_onednn = pytest.mark.skipif(not ONEDNN, reason="this torch has no oneDNN")


@needs_onednn
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_are_those_of_float64(calls, layout):
    x, w = draws((5, 700), (11, 700))
    w = LAYOUTS[layout](w)
    exact = functional.linear(x.double(), w.double())
    torch.testing.assert_close(onednn_linear(x, w).double(), exact, rtol=1e-5, atol=1e-4)
    assert len(calls) == 1


@needs_onednn
def test_what_onednn_cannot_do_is_torchs_own(calls, monkeypatch):
    x, w = draws((5, 7), (11, 7))
    expected = functional.linear(x, w)
    learning = w.clone().requires_grad_()
    assert onednn_linear(x, learning).grad_fn is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert onednn_linear(x, w).dtype == torch.bfloat16
    assert onednn_linear(x[:0], w).shape == (0, 11)
    assert onednn_linear(x.double(), w.double()).dtype == torch.float64
    strided = torch.ones(22, 14)[::2, ::2]
    assert torch.equal(onednn_linear(torch.ones(5, 7), strided), torch.full((5, 11), 7.0))
    with pytest.raises(RuntimeError, match="dtype"):
        onednn_linear(x, w.double())
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert torch.equal(onednn_linear(x, w), expected)
    assert calls == []


@needs_onednn
def test_not_finite_numbers_stay_visible(calls):
    w = torch.ones(11, 7)
    assert bool(onednn_linear(torch.full((2, 7), torch.nan), w).isnan().all())
    x = torch.zeros(1, 7)
    x[0, 2] = torch.inf
    assert bool((onednn_linear(x, w) == torch.inf).all())
    assert len(calls) == 2


@needs_onednn
@pytest.mark.parametrize("lazy", [True, False])
def test_the_divergence_keeps_its_exactness(calls, lazy):
    h, ref, w = draws((6, 16), (6, 16), (700, 16), seed=3)
    ref, targets = h + 0.3 * ref, torch.arange(6)

    def numbers(kernel, dtype):
        x = h.to(dtype).requires_grad_()
        kl, nll = kernel(x, ref.to(dtype), w.T.to(dtype), targets)
        (grad,) = torch.autograd.grad(kl.pow(2).sum() - nll.sum(), x)
        return [t.detach().double() for t in (kl, nll, grad)]

    exact = numbers(naive_kl_and_nll, torch.float64)
    ours = numbers(lambda *a: reverse_kl_and_nll(*a, lazy=lazy), torch.float32)
    assert len(calls) > 0
    for a, t in zip(ours, exact, strict=True):
        assert float((a - t).abs().max()) <= 1e-5 * max(1.0, float(t.abs().max()))


@needs_onednn
def test_scoring_goes_through_it_and_is_right(calls):
    h, w, b = draws((6, 16), (700, 16), (700,), seed=4)
    exact = h.double() @ w.T.double() + b.double()
    plain, quick = (logsumexp(h, w.T, b, scoring=scoring) for scoring in (False, True))
    assert len(calls) == 1
    for found in (plain, quick):
        assert float((found.double() - exact.logsumexp(1)).abs().max()) <= 1e-5
    tokens = torch.tensor([[3, 699]] * 6)
    scores = log_probs_at(h, w.T, tokens, bias=b)
    assert len(calls) == 2
    assert float((scores.double() - exact.log_softmax(1).gather(1, tokens)).abs().max()) <= 1e-5
