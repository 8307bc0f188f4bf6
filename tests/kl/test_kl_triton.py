"""The Triton kernel, on a GPU or under its interpreter, against float64 and the torch sweep."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from shl.kl import forward_kl_and_nll, fused, reverse_kl_and_nll
from shl.kl.divergence import naive_kl_and_nll
from shl.kl.sweep import sweep
from shl.kl.triton import fused_sweep

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def on_device():
    with torch.device(DEVICE):
        yield


def inputs(tok, d, vocab, *, scale=1.0, apart=0.3, seed=0):
    g = torch.Generator(DEVICE).manual_seed(seed)
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
    bias = torch.linspace(-2, 2, vocab) if with_bias else None
    got = fused_sweep(h, delta, unembed, bias)
    kl, grad, lse, mean_w = truth(h, delta, unembed, bias)
    assert (got.kl - kl).abs().max() <= 2e-6 * (1 + kl.max())
    assert (got.lse - lse).abs().max() <= 1e-5
    assert (got.mean_w - mean_w).abs().max() <= 1e-5
    assert (got.grad_kl - grad).abs().max() <= 1e-5 * (1 + grad.abs().max())


def test_many_chunks_equal_one(monkeypatch):
    h, delta, unembed = inputs(3, 8, 5000)
    one = fused_sweep(h, delta, unembed, None)
    monkeypatch.setattr("shl.kl.triton.CHUNK_BYTES", 1)  # 1024 tokens of the vocabulary at a time
    many = fused_sweep(h, delta, unembed, None)
    for a, b in zip(vars(one).values(), vars(many).values(), strict=True):
        assert (a - b).abs().max() <= 1e-5 * (1 + b.abs().max())


def test_kl_and_gradient_of_equal_states_are_exactly_zero():
    h, delta, unembed = inputs(3, 8, 2000, apart=0.0)
    got = fused_sweep(h, delta, unembed, None)
    assert torch.equal(got.kl, torch.zeros(3))
    assert torch.equal(got.grad_kl, torch.zeros(3, 8))


@pytest.mark.parametrize(
    ("scale", "apart", "least", "most", "tolerance"),
    [(1.0, 1e-3, 0.0, 1e-4, 1e-4), (4.0, 30.0, 40.0, torch.inf, 1e-5)],
    ids=["near", "far"],
)
def test_tiny_and_large_kl_are_accurate(scale, apart, least, most, tolerance):
    h, delta, unembed = inputs(4, 8, 2000, scale=scale, apart=apart)
    kl = truth(h, delta, unembed)[0]
    assert least < kl.max() < most
    assert (fused_sweep(h, delta, unembed, None).kl - kl).abs().max() <= tolerance * kl.max()


def test_error_in_bf16_is_at_most_that_of_naive_bf16():
    h, delta, unembed = inputs(4, 16, 3000)
    h, unembed = h.bfloat16(), unembed.bfloat16()
    ref = (h.float() - delta).bfloat16()
    exact = h.float() - ref.float()
    kl, grad, *_ = truth(h.float(), exact, unembed.float())
    got = fused_sweep(h, exact, unembed, None)
    naive, _ = naive_kl_and_nll(h, ref, unembed, torch.zeros(4, dtype=torch.long))
    assert (got.kl - kl).abs().max() <= (naive.double() - kl).abs().max() + 1e-6
    assert (got.grad_kl - grad).abs().max() <= 0.02 * grad.abs().max()


@pytest.mark.parametrize(
    ("kernel", "sweeps"),
    [
        (reverse_kl_and_nll, 1),
        # Forward without delta, and backward for the rows with an upstream gradient.
        (partial(reverse_kl_and_nll, lazy=True), 2),
        (forward_kl_and_nll, 2),
    ],
)
def test_public_functions_use_the_kernel_inside_fused(monkeypatch, kernel, sweeps):
    h, delta, unembed = inputs(4, 8, 2000)
    targets = torch.tensor([0, 5, 9, 1999])
    upstream = torch.tensor([0.3, -1.0, 0.0, 2.0])

    def run():
        x = h.clone().requires_grad_(True)
        kl, nll = kernel(x, h - delta, unembed, targets)
        (kl @ upstream - nll @ upstream.flip(0)).backward()
        return kl.detach(), nll.detach(), x.grad

    with fused(False):
        expected = run()
    calls = []
    monkeypatch.setattr(
        "shl.kl.triton.fused_sweep", lambda *a, **k: calls.append(1) or fused_sweep(*a, **k)
    )
    with fused():
        got = run()
    assert len(calls) == sweeps
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= 1e-5
    with fused(False):
        run()
    assert len(calls) == sweeps


@pytest.mark.parametrize("on", [True, False])
def test_backward_takes_the_kernel_if_forward_did(monkeypatch, on):
    """On CUDA autograd runs it in another thread, which does not see the context manager."""
    h, delta, unembed = inputs(4, 8, 2000)
    calls = []
    monkeypatch.setattr(
        "shl.kl.triton.fused_sweep", lambda *a, **k: calls.append(1) or fused_sweep(*a, **k)
    )
    x = h.requires_grad_(True)
    with fused(on):
        kl, _ = reverse_kl_and_nll(x, h.detach() - delta, unembed, torch.arange(4), lazy=True)
    with fused(not on):
        kl.sum().backward()
    assert len(calls) == 2 * on


@pytest.mark.parametrize(
    ("dtype", "close"),
    # The kernel rounds delta, e and e u to bf16, by up to 2^-9 each; torch's sweep on a CPU none.
    [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)],
)
def test_equals_the_torch_sweep(dtype, close):
    h, delta, unembed = inputs(6, 8, 4100, scale=2.0, apart=1.0)
    h, unembed = h.to(dtype).float(), unembed.to(dtype)
    a, b = fused_sweep(h, delta, unembed, None), sweep(h, delta, unembed, None)
    for x, y in zip(vars(a).values(), vars(b).values(), strict=True):
        assert (x - y).abs().max() <= close * (1 + y.abs().max())


@pytest.mark.parametrize("vocab", [700, 4100])
def test_no_kl_without_delta_and_mean_w_is_used_if_known(vocab):
    h, delta, unembed = inputs(6, 8, vocab)
    whole = fused_sweep(h, delta, unembed, None)
    half = fused_sweep(h, None, unembed, None)
    assert half.kl is None
    assert half.grad_kl is None
    assert torch.equal(half.lse, whole.lse)
    assert torch.equal(half.mean_w, whole.mean_w)
    rest = fused_sweep(h, delta, unembed, None, mean_w=whole.mean_w)
    assert rest.mean_w is whole.mean_w
    assert torch.equal(rest.grad_kl, whole.grad_kl)


COMPILE = """
import itertools
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from shl.kl.triton import BLOCK, _row
from shl.kl.sweep import LARGE

inputs = dict.fromkeys(("z_ptr", "u_ptr", "state_ptr"), "*fp32")
fixed = ("first", "divergence", "large", "block")
for out, first, divergence in itertools.product(("fp32", "bf16"), (True, False), (True, False)):
    source = ASTSource(
        fn=_row,
        signature=inputs
        | dict.fromkeys(("e_ptr", "eu_ptr"), "*" + out)
        | {"width": "i32"}
        | dict.fromkeys(fixed, "constexpr"),
        constexprs=dict(zip(fixed, (first, divergence, LARGE, BLOCK))),
    )
    print(len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]) > 0)
"""


def test_the_kernel_compiles_for_an_h100(tmp_path):
    # Triton's interpreter accepts code that its compiler rejects, such as a type change in a loop.
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=env, timeout=300
    )
    assert done.stdout.split() == ["True"] * 8, done.stderr[-2000:]
