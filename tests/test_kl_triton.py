"""The Triton kernel under its interpreter, against float64 and against the torch sweep."""

import pytest
import torch

from shl.kl import fused, naive_kl_and_nll, reverse_kl_and_nll
from shl.kl_triton import fused_sweep
from shl.sweep import sweep


def inputs(tok, d, vocab, *, scale=1.0, apart=0.3, seed=0):
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(tok, d, generator=g) * scale
    delta = torch.randn(tok, d, generator=g) * apart
    return h, delta, torch.randn(vocab, d, generator=g).T


def truth(h, delta, unembed, bias=None):
    """KL and its gradient from full float64 logits."""
    h = h.double().requires_grad_(True)
    ref = h.detach() - delta.double()
    bias = None if bias is None else bias.double()
    targets = torch.zeros(len(h), dtype=torch.long)
    kl, _ = naive_kl_and_nll(h, ref, unembed.double(), targets, bias=bias)
    (grad,) = torch.autograd.grad(kl.sum(), h)
    logits = h.detach() @ unembed.double() + (0 if bias is None else bias)
    return kl.detach(), grad, logits.logsumexp(1), logits.softmax(1) @ unembed.double().T


@pytest.mark.parametrize(
    ("tok", "d", "vocab"), [(1, 4, 5), (3, 8, 1024), (2, 8, 1025), (5, 16, 3001)]
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_float64(tok, d, vocab, with_bias):
    h, delta, unembed = inputs(tok, d, vocab)
    bias = torch.randn(vocab, generator=torch.Generator().manual_seed(1)) if with_bias else None
    got = fused_sweep(h, delta, unembed, bias)
    kl, grad, lse, mean_w = truth(h, delta, unembed, bias)
    assert (got.kl - kl).abs().max() <= 2e-6 * (1 + kl.max())
    assert (got.lse - lse).abs().max() <= 1e-5
    assert (got.mean_w - mean_w).abs().max() <= 1e-5
    assert (got.grad_kl - grad).abs().max() <= 1e-5 * (1 + grad.abs().max())


def test_many_chunks_equal_one(monkeypatch):
    h, delta, unembed = inputs(3, 8, 5000)
    one = fused_sweep(h, delta, unembed, None)
    monkeypatch.setattr("shl.kl_triton.CHUNK_BYTES", 1)  # 1024 words at a time
    many = fused_sweep(h, delta, unembed, None)
    for a, b in zip(vars(one).values(), vars(many).values(), strict=True):
        assert (a - b).abs().max() <= 1e-5 * (1 + b.abs().max())


def test_no_difference_has_no_divergence():
    h, delta, unembed = inputs(3, 8, 2000, apart=0.0)
    got = fused_sweep(h, delta, unembed, None)
    assert torch.equal(got.kl, torch.zeros(3))
    assert torch.equal(got.grad_kl, torch.zeros(3, 8))


def test_near_zero_is_near_exact():
    h, delta, unembed = inputs(4, 8, 2000, apart=1e-3)
    kl = truth(h, delta, unembed)[0]
    assert kl.max() < 1e-4
    assert (fused_sweep(h, delta, unembed, None).kl - kl).abs().max() <= 1e-4 * kl.max()


def test_far_from_the_reference_stays_finite_and_right():
    h, delta, unembed = inputs(4, 8, 2000, scale=4.0, apart=30.0)
    kl = truth(h, delta, unembed)[0]
    assert kl.max() > 40
    assert (fused_sweep(h, delta, unembed, None).kl - kl).abs().max() <= 1e-5 * kl.max()


def test_bf16_is_no_further_off_than_naive_bf16():
    h, delta, unembed = inputs(4, 16, 3000)
    h, unembed = h.bfloat16(), unembed.bfloat16()
    ref = (h.float() - delta).bfloat16()
    exact = h.float() - ref.float()
    kl, grad, *_ = truth(h.float(), exact, unembed.float())
    got = fused_sweep(h, exact, unembed, None)
    naive, _ = naive_kl_and_nll(h, ref, unembed, torch.zeros(4, dtype=torch.long))
    assert (got.kl - kl).abs().max() <= (naive.double() - kl).abs().max() + 1e-6
    assert (got.grad_kl - grad).abs().max() <= 0.02 * grad.abs().max()


def test_the_kernel_stands_behind_the_public_function_when_asked_for(monkeypatch):
    h, delta, unembed = inputs(4, 8, 2000)
    targets = torch.tensor([0, 5, 9, 1999])
    upstream = torch.tensor([0.3, -1.0, 0.0, 2.0])

    def run():
        x = h.clone().requires_grad_(True)
        kl, nll = reverse_kl_and_nll(x, h - delta, unembed, targets)
        (kl @ upstream - nll @ upstream.flip(0)).backward()
        return kl.detach(), nll.detach(), x.grad

    expected = run()
    calls = []
    monkeypatch.setattr("shl.kl_triton.fused_sweep", lambda *a: calls.append(1) or fused_sweep(*a))
    with fused():
        got = run()
    assert calls == [1]
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= 1e-5
    run()
    assert calls == [1]


def test_the_torch_sweep_agrees(monkeypatch):
    h, delta, unembed = inputs(6, 8, 4100, scale=2.0, apart=1.0)
    a, b = fused_sweep(h, delta, unembed, None), sweep(h, delta, unembed, None)
    for x, y in zip(vars(a).values(), vars(b).values(), strict=True):
        assert (x - y).abs().max() <= 1e-5 * (1 + y.abs().max())
