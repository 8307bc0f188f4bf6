"""The lazy path of the barrier: same numbers, and gradients only where they are asked for."""

import pytest
import torch

from shl.kl import divergence as room
from shl.kl import logsumexp, reverse_kl_and_nll
from shl.utils.errors import ShlError


def problem(seed=0, tok=9, d=16, vocab=501):
    g = torch.Generator().manual_seed(seed)
    ref = torch.randn(tok, d, generator=g)
    h = ref + 0.2 * torch.randn(tok, d, generator=g)
    w = torch.randn(d, vocab, generator=g)
    targets = torch.randint(0, vocab, (tok,), generator=g)
    return h, ref, w, targets, torch.randn(vocab, generator=g)


def float64_truth(h, ref, w, targets, bias, kl_up, nll_up):
    h = h.double().clone().requires_grad_(True)
    log_p = (h @ w.double() + bias.double()).log_softmax(1)
    log_q = (ref.double() @ w.double() + bias.double()).log_softmax(1)
    kl = (log_p.exp() * (log_p - log_q)).sum(1)
    nll = -log_p.gather(1, targets[:, None])[:, 0]
    (kl @ kl_up.double() + nll @ nll_up.double()).backward()
    return kl.detach(), nll.detach(), h.grad


@pytest.mark.parametrize("known", [True, False])
def test_lazy_values_and_gradients_equal_float64(known):
    h, ref, w, targets, bias = problem()
    kl_up = torch.tensor([0.0, 1.5, 0, 0, -2, 0, 0, 0.25, 0])
    nll_up = torch.linspace(-1, 1, 9)
    leaf = h.clone().requires_grad_(True)
    ref_lse = logsumexp(ref, w, bias) if known else None
    kl, nll = reverse_kl_and_nll(leaf, ref, w, targets, bias=bias, ref_lse=ref_lse, lazy=True)
    (kl @ kl_up + nll @ nll_up).backward()
    truth = float64_truth(h, ref, w, targets, bias, kl_up, nll_up)
    torch.testing.assert_close(kl.detach().double(), truth[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(nll.detach().double(), truth[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(leaf.grad.double(), truth[2], atol=2e-5, rtol=1e-5)


def test_the_kl_gradient_is_formed_for_rows_with_an_upstream_alone(monkeypatch):
    h, ref, w, targets, bias = problem()
    real, rows = room.sweep, []

    def counting(student, delta, *args, **kwargs):
        if delta is not None:
            rows.append(len(student))
        return real(student, delta, *args, **kwargs)

    monkeypatch.setattr(room, "sweep", counting)
    leaf = h.clone().requires_grad_(True)
    kl, nll = reverse_kl_and_nll(leaf, ref, w, targets, bias=bias, lazy=True)
    torch.autograd.grad(nll.sum(), leaf, retain_graph=True)
    assert rows == []
    torch.autograd.grad(torch.relu(kl - kl.detach().median()).sum(), leaf)
    assert rows == [4]  # of nine values four lie above their median


def test_a_reference_lse_that_would_be_ignored_is_refused():
    h, ref, w, targets, _ = problem()
    with pytest.raises(ShlError, match="lazy is False"):
        reverse_kl_and_nll(h, ref, w, targets, ref_lse=torch.zeros(9))
