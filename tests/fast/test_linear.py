"""Products through oneDNN against float64 and against torch's own function."""

import pytest
import torch
from torch.nn import functional

from shl.fast import linear
from shl.fast.linear import ONEDNN, onednn_linear
from shl.kl import log_probs_at, logsumexp, reverse_kl_and_nll

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
    """Weight shapes of the calls of oneDNN's operator, as on a CPU where it is faster."""
    monkeypatch.setattr(linear, "ONEDNN_FASTER", True)
    seen, real = [], torch.ops.mkldnn._linear_pointwise

    def count(*args):
        seen.append(args[1].shape)
        return real(*args)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", count)
    return seen


needs_onednn = pytest.mark.skipif(not ONEDNN, reason="this torch has no oneDNN")


@needs_onednn
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_equal_float64(calls, layout):
    x, w = draws((5, 700), (11, 700))
    w = LAYOUTS[layout](w)
    exact = functional.linear(x.double(), w.double())
    torch.testing.assert_close(onednn_linear(x, w).double(), exact, rtol=1e-5, atol=1e-4)
    assert len(calls) == 1


@needs_onednn
def test_torchs_own_function_where_onednn_does_not_apply(calls, monkeypatch):
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
def test_nan_and_inf_propagate(calls):
    w = torch.ones(11, 7)
    assert bool(onednn_linear(torch.full((2, 7), torch.nan), w).isnan().all())
    x = torch.zeros(1, 7)
    x[0, 2] = torch.inf
    assert bool((onednn_linear(x, w) == torch.inf).all())
    assert len(calls) == 2


@needs_onednn
def test_scores_and_divergences_use_onednn(calls):
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
    for lazy in (True, False):  # tests/kl checks these values
        before = len(calls)
        reverse_kl_and_nll(h, h, w.T, torch.arange(6), lazy=lazy)
        assert len(calls) > before


@needs_onednn
def test_mkl_where_it_is_faster(calls, monkeypatch):
    h, w = draws((6, 16), (700, 16), seed=5)
    monkeypatch.setattr(linear, "ONEDNN_FASTER", False)
    exact = (h.double() @ w.T.double()).logsumexp(1)
    found = logsumexp(h, w.T, None, scoring=True)
    assert float((found.double() - exact).abs().max()) <= 1e-5
    for lazy in (True, False):
        reverse_kl_and_nll(h, h, w.T, torch.arange(6), lazy=lazy)
    assert calls == []
