"""Products through oneDNN against float64 and against torch's own function."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional

import shl.fast.linear
from shl.fast.blocks import FastGatedMLP, FastUnembed
from shl.fast.linear import AVAILABLE, linear
from shl.kl import log_probs_at, logsumexp, reverse_kl_and_nll
from shl.kl.divergence import naive_kl_and_nll
from shl.models.tiny import tiny_gemma
from shl.models.tokens import pad_left

needs_onednn = pytest.mark.skipif(not AVAILABLE, reason="this torch has no oneDNN")


@pytest.fixture
def always(monkeypatch):
    """Small products go to oneDNN too; the list counts them."""
    seen = []
    inner = shl.fast.linear._product

    def count(x, weight, bias):
        seen.append((tuple(x.shape), tuple(weight.shape)))
        return inner(x, weight, bias)

    monkeypatch.setattr(shl.fast.linear, "LARGE_WEIGHT", 0)
    monkeypatch.setattr(shl.fast.linear, "_product", count)
    return seen


def leaves(*shapes, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


LAYOUTS = {
    "rows": lambda w: w,
    "columns": lambda w: w.T.contiguous().T,
    "some rows": lambda w: torch.cat([w, w, w])[len(w) : 2 * len(w)],
    "some columns": lambda w: torch.cat([w, w, w]).T[:, len(w) : 2 * len(w)].T,
}


@needs_onednn
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(7,), (1, 7), (5, 7), (2, 3, 7)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_are_those_of_float64(always, layout, shape, with_bias):
    x, w, b = leaves(shape, (11, 7), (11,))
    bias = b if with_bias else None
    upstream = torch.randn((*shape[:-1], 11), generator=torch.Generator().manual_seed(1))
    out = linear(x, LAYOUTS[layout](w), bias)
    found = torch.autograd.grad(out, [x, w, b][: 2 + with_bias], upstream)
    assert (11, 7) in [weight for _, weight in always]
    assert len(always) >= 3

    x64, w64, b64 = leaves(shape, (11, 7), (11,), dtype=torch.float64)
    exact = functional.linear(x64, LAYOUTS[layout](w64), b64 if with_bias else None)
    true = torch.autograd.grad(exact, [x64, w64, b64][: 2 + with_bias], upstream.double())
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    for a, t in zip(found, true, strict=True):
        torch.testing.assert_close(a.double(), t, rtol=1e-5, atol=1e-5)


@needs_onednn
def test_gradients_are_only_formed_for_what_learns_and_only_it_is_kept(always):
    x, w = leaves((5, 7), (11, 7))
    out = linear(x, w.detach())
    assert out.grad_fn.saved_tensors[0] is None
    before = len(always)
    out.sum().backward()
    assert len(always) == before + 1
    assert x.grad is not None


@needs_onednn
def test_gradients_of_gradients(always):
    found = []
    for product, dtype in ((linear, torch.float32), (functional.linear, torch.float64)):
        x, w = leaves((5, 7), (11, 7), dtype=dtype)
        (g,) = torch.autograd.grad(product(x, w).pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(g.pow(2).sum(), w)[0].double())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-4)


# torch's own forward-mode rules are compiled with a function that torch calls deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_what_onednn_cannot_do_is_torchs_own(always, monkeypatch):
    x, w = (t.detach() for t in leaves((5, 7), (11, 7)))
    expected = functional.linear(x, w)

    value, tangent = torch.func.jvp(lambda x: linear(x, w), (x,), (x,))
    assert torch.equal(value, expected)
    assert torch.equal(tangent, expected)
    assert torch.equal(torch.func.vmap(lambda x: linear(x, w))(x), expected)
    with forward_ad.dual_level():
        dual = linear(forward_ad.make_dual(x, x), w)
        assert torch.equal(forward_ad.unpack_dual(dual).tangent, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, w).dtype == torch.bfloat16
    assert torch.equal(linear(x.double(), w.double()), functional.linear(x.double(), w.double()))
    assert linear(x[:0], w).shape == (0, 11)
    for strided in (
        torch.ones(22, 14)[::2, ::2],
        torch.ones(11, 14)[:, :7],
        torch.ones(7, 22).T[:11],
    ):
        assert torch.equal(linear(torch.ones(5, 7), strided), torch.full((5, 11), 7.0))
    with pytest.raises(RuntimeError, match="dtype"):
        linear(x, w.double())
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert torch.equal(linear(x, w), expected)
    assert always == []


@needs_onednn
def test_not_finite_numbers_stay_visible(always):
    w = torch.ones(11, 7)
    assert bool(linear(torch.full((2, 7), torch.nan), w).isnan().all())
    x = torch.zeros(1, 7)
    x[0, 2] = torch.inf
    assert bool((linear(x, w) == torch.inf).all())
    assert len(always) == 2


@pytest.mark.parametrize(
    ("rows", "shape", "large"),
    [
        (1, (512, 512), True),
        (1, (511, 512), False),
        (64, (256, 512), True),
        (63, (256, 512), False),
    ],
)
def test_small_products_stay_with_torch(rows, shape, large):
    x, w = torch.zeros(rows, shape[1]), torch.zeros(shape)
    # 2^18 numbers in W, or rows times numbers of 2^23.
    assert (w.numel() >= 2**18 or rows * w.numel() >= 2**23) == large
    assert shl.fast.linear._suits(x, w, None) == (large and AVAILABLE)


def test_deep_products_stay_with_torch_unless_the_caller_says_otherwise():
    x, w = torch.zeros(4, 769), torch.zeros(512, 769)
    assert not shl.fast.linear._suits(x, w, None)
    assert shl.fast.linear._suits(x, w, None, deep=True) == AVAILABLE
    assert shl.fast.linear._suits(x[:, :768], w[:, :768].contiguous(), None) == AVAILABLE


@needs_onednn
def test_a_models_forward_and_backward_go_through_it(always, monkeypatch):
    model = tiny_gemma()
    assert all(type(block.mlp) is FastGatedMLP for block in model.blocks)
    assert type(model.unembed) is FastUnembed
    batch = pad_left(model, [[2, 9, 7, 30], [2, 8]])

    def run():
        inputs = model.embed(batch.tokens).detach().requires_grad_()
        with model.hooks([("hook_embed", lambda x, hook: inputs)]):
            logits = model(batch.tokens, attention_mask=batch.mask)
        logits.pow(2).sum().backward()
        return logits.detach(), inputs.grad

    found = run()
    linears = 7 * model.cfg.n_layers + 1
    assert len(always) == 2 * linears
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    expected = run()
    assert len(always) == 2 * linears
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@needs_onednn
@pytest.mark.parametrize("lazy", [True, False])
def test_the_divergence_keeps_its_exactness(always, lazy):
    h, ref, w = (t.detach() for t in leaves((6, 16), (6, 16), (700, 16), seed=3))
    ref, targets = h + 0.3 * ref, torch.arange(6)

    def errors(kernel, dtype):
        x = h.to(dtype).requires_grad_()
        kl, nll = kernel(x, ref.to(dtype), w.T.to(dtype), targets)
        (grad,) = torch.autograd.grad(kl.pow(2).sum() - nll.sum(), x)
        return [t.detach().double() for t in (kl, nll, grad)]

    truth = errors(naive_kl_and_nll, torch.float64)
    ours = errors(lambda *a: reverse_kl_and_nll(*a, lazy=lazy), torch.float32)
    assert len(always) > 0
    for a, t in zip(ours, truth, strict=True):
        assert float((a - t).abs().max()) <= 1e-5 * max(1.0, float(t.abs().max()))


@needs_onednn
def test_scoring_goes_through_it_and_is_right(always):
    h, w, b = (t.detach() for t in leaves((6, 16), (700, 16), (700,), seed=4))
    exact = (h.double() @ w.T.double() + b.double()).logsumexp(1)
    plain, quick = (logsumexp(h, w.T, b, scoring=scoring) for scoring in (False, True))
    assert len(always) == 1
    assert float((quick.double() - exact).abs().max()) <= 1e-5
    assert float((plain.double() - exact).abs().max()) <= 1e-5
    words = torch.tensor([[3, 699]] * 6)
    scores = log_probs_at(h, w.T, words, bias=b)
    true = (h.double() @ w.T.double() + b.double()).log_softmax(1).gather(1, words)
    assert len(always) == 2
    assert float((scores.double() - true).abs().max()) <= 1e-5
