"""KL and NLL against float64 log-softmax, gradients and the lazy path included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shl.kl import (
    divergence,
    forward_kl_and_nll,
    log_probs_at,
    logsumexp,
    nll,
    nll_and_top,
    reverse_kl_and_nll,
)
from shl.kl import sweep as sweep_module
from shl.kl.divergence import naive_kl_and_nll
from shl.utils.errors import ShlError

WAYS = {"reverse": reverse_kl_and_nll, "forward": forward_kl_and_nll}


@pytest.fixture
def chunks(monkeypatch):
    """Chunks of 2 x 3 tokens, so that small vocabularies have several and a smaller last one."""
    monkeypatch.setattr(sweep_module, "chunk_size", lambda tokens, vocab, **_: min(vocab, 7))
    monkeypatch.setattr(sweep_module, "WIDTH", 3)


@given(st.integers(0, 3000), st.integers(1, 300_000))
def test_chunks_partition_the_vocabulary_and_bound_the_number_of_logits(tokens, vocab):
    end = 0
    for start, count, width in sweep_module.chunks(tokens, vocab):
        assert start == end
        assert 0 < width <= sweep_module.WIDTH
        assert tokens * count * width <= max(1 << 20, 512 * tokens)
        end = start + count * width
    assert end == vocab


def case(tok=5, d=8, vocab=23, *, seed=0, step=0.5, bias=False, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(tok, d, generator=g)
    ref = h + step * torch.randn(tok, d, generator=g)
    w = torch.randn(d, vocab, generator=g)
    targets = torch.randint(vocab, (tok,), generator=g)
    b = torch.randn(vocab, generator=g) if bias else None
    return h.to(dtype), ref.to(dtype), w.to(dtype), targets, b


def truth(h, ref, w, targets, b, way):
    """Float64, two full log-softmaxes, the definition."""
    bias = 0 if b is None else b.double()
    log_p = (h @ w.double() + bias).log_softmax(1)
    log_q = (ref.double() @ w.double() + bias).log_softmax(1)
    left, right = (log_p, log_q) if way == "reverse" else (log_q, log_p)
    return (left.exp() * (left - right)).sum(1), -log_p.gather(1, targets[:, None])[:, 0]


def with_gradient(function, h, upstream):
    """Values and d(upstream . values)/dh."""
    h = h.detach().clone().requires_grad_(True)
    values = function(h)
    total = sum((u.to(v.dtype) * v).sum() for u, v in zip(upstream, values, strict=True))
    return [v.detach().double() for v in values], torch.autograd.grad(total, h)[0].double()


def check_against_truth(h, ref, w, targets, b, way, tolerance=1e-6):
    """Our error may not exceed that of naive fp32 by more than `tolerance` of the value's size."""
    g = torch.Generator().manual_seed(9)
    upstream = torch.randn(2, len(h), generator=g).double()  # signed, independent per token
    ours = with_gradient(lambda x: WAYS[way](x, ref, w, targets, bias=b), h, upstream)
    plain = with_gradient(
        lambda x: naive_kl_and_nll(
            x, ref.float(), w.float(), targets, bias=b, reverse=way == "reverse"
        ),
        h.float(),
        upstream,
    )
    exact = with_gradient(lambda x: truth(x, ref, w, targets, b, way), h.double(), upstream)
    rows = [*zip(ours[0], plain[0], exact[0], strict=True), (ours[1], plain[1], exact[1])]
    for got, naive, true in rows:
        allowed = (naive - true).abs().max() + tolerance * (1 + true.abs().max())
        assert (got - true).abs().max() <= allowed


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("tok", "vocab"), [(1, 1), (1, 23), (5, 14), (6, 23), (3, 252), (4, 507)])
def test_values_and_gradients_are_no_further_from_float64_than_naive(chunks, way, bias, tok, vocab):
    check_against_truth(*case(tok, vocab=vocab, bias=bias), way)


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    tok=st.integers(1, 6),
    d=st.integers(1, 9),
    vocab=st.integers(2, 40),
    step=st.sampled_from([0.0, 1e-3, 0.3, 3.0]),
    seed=st.integers(0, 1000),
)
def test_any_small_shape_agrees_with_float64(way, tok, d, vocab, step, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_module, "chunk_size", lambda tokens, vocab, **_: min(vocab, 7))
        patch.setattr(sweep_module, "WIDTH", 3)
        # A single token's naive error can be 0 by luck: allow for rounding of logits near 30.
        check_against_truth(*case(tok, d, vocab, seed=seed, step=step), way, tolerance=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_bf16_inputs_give_fp32_values_and_bf16_gradients(chunks, way):
    h, ref, w, targets, _ = case(dtype=torch.bfloat16)
    check_against_truth(h, ref, w, targets, None, way, tolerance=1e-2)  # 8 bits of gradient
    h.requires_grad_(True)
    kl, nll_ = WAYS[way](h, ref, w, targets)
    assert kl.dtype == nll_.dtype == torch.float32
    (kl + nll_).sum().backward()
    assert h.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("way", WAYS)
def test_gradient_equals_central_differences(chunks, way):
    h, ref, w, targets, _ = case(2, 4, 23)
    _, gradient = with_gradient(lambda x: WAYS[way](x, ref, w, targets), h, torch.ones(2, 2))
    eps = 1e-2  # central differences: error eps^2 plus fp32 noise / eps, about 1e-4 each
    for i in range(2):
        for j in range(4):
            step = torch.zeros(2, 4)
            step[i, j] = eps
            up, down = (
                sum(v.double().sum() for v in WAYS[way](h + s, ref, w, targets))
                for s in (step, -step)
            )
            assert (up - down) / (2 * eps) == pytest.approx(float(gradient[i, j]), abs=3e-3)


@pytest.mark.parametrize("way", WAYS)
def test_kl_and_gradient_of_equal_states_are_exactly_zero(chunks, way):
    h, _, w, targets, b = case(bias=True)
    (kl, _), gradient = with_gradient(
        lambda x: WAYS[way](x, h, w, targets, bias=b), h, (torch.ones(5), torch.zeros(5))
    )
    assert torch.equal(kl, torch.zeros(5).double())
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("chunked", [False, True])
def test_kl_of_hundreds_of_nats_is_finite_and_accurate(request, chunked, way):
    if chunked:
        request.getfixturevalue("chunks")
    h, ref, w, targets, _ = case(6, step=2.0)
    h, ref = 40 * h, 40 * ref
    exact, _ = truth(h.double(), ref, w, targets, None, way)
    assert exact.max() > 200
    (kl, _), gradient = with_gradient(
        lambda x: WAYS[way](x, ref, w, targets), h, (torch.ones(6), torch.ones(6))
    )
    assert torch.isfinite(gradient).all()
    assert torch.allclose(kl, exact, rtol=1e-5, atol=1e-4)
    check_against_truth(h, ref, w, targets, None, way)


@pytest.mark.parametrize("way", WAYS)
def test_kl_below_1e_5_nats_is_accurate(chunks, way):
    h, ref, w, targets, _ = case(8, step=1e-3)
    exact, _ = truth(h.double(), ref, w, targets, None, way)
    assert 1e-6 < exact.mean() < 1e-5  # nats
    kl, _ = WAYS[way](h, ref, w, targets)
    assert (kl.double() - exact).abs().max() < 1e-8
    assert (kl > 0).all()


@pytest.mark.parametrize("way", WAYS)
def test_only_the_student_gets_a_gradient(way):
    h, ref, w, targets, _ = case()
    for x in (h, ref, w):
        x.requires_grad_(True)
    sum(WAYS[way](h, ref, w, targets)).sum().backward()
    assert h.grad is not None
    assert ref.grad is None
    assert w.grad is None


def test_kl_by_hand_for_two_tokens():
    # One feature, W = [0, 1]: p = (1/2, 1/2) at h = 0, q = (1/4, 3/4) at h_ref = log 3.
    h, ref = torch.zeros(1, 1), torch.tensor([[3.0]]).log()
    w, targets = torch.tensor([[0.0, 1.0]]), torch.tensor([1])
    # KL(p||q) = 1/2 log 2 + 1/2 log(2/3); KL(q||p) = 1/4 log(1/2) + 3/4 log(3/2); NLL = log 2
    kl, loss = reverse_kl_and_nll(h, ref, w, targets)
    assert (float(kl), float(loss)) == pytest.approx((0.1438410, 0.6931472), abs=1e-6)
    assert float(forward_kl_and_nll(h, ref, w, targets)[0]) == pytest.approx(0.1308120, abs=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_nll_and_the_largest_probability_equal_log_softmax(chunks, bias):
    h, _, w, targets, b = case(bias=bias)
    log_p = (h.double() @ w.double() + (0 if b is None else b.double())).log_softmax(1)
    losses, top = nll_and_top(h, w, targets, bias=b)
    assert (losses + log_p.gather(1, targets[:, None])[:, 0]).abs().max() <= 1e-5
    assert (top - log_p.exp().amax(1)).abs().max() <= 1e-5


@pytest.mark.parametrize("bias", [False, True])
def test_log_probs_at_and_nll_equal_log_softmax(chunks, bias):
    h, _, w, targets, b = case(bias=bias)
    exact = (h.double() @ w.double() + (0 if b is None else b.double())).log_softmax(1)
    tokens = torch.tensor([[0, 22, 7]] * 5)
    got = log_probs_at(h, w, tokens, bias=b)
    assert torch.allclose(got.double(), exact.gather(1, tokens), atol=1e-5)
    for relative in ([True, False, False, True, False], [True] * 5):
        relative = torch.tensor(relative)
        part = log_probs_at(h, w, tokens, bias=b, relative=relative)
        assert torch.allclose(part[~relative], got[~relative], atol=1e-5)
        assert torch.allclose(part - part[:, :1], got - got[:, :1], atol=1e-5)
        assert ((part - got).abs().amin(1) > 0.1).equal(relative)
    loss = nll(h.requires_grad_(True), w, targets, bias=b)
    assert torch.allclose(loss.double(), -exact.gather(1, targets[:, None])[:, 0], atol=1e-5)
    assert not loss.requires_grad


@pytest.mark.parametrize("z", [5.0, 10.0, 20.0, 40.0, 100.0])
def test_kl_with_all_mass_on_a_token_of_a_later_chunk(chunks, z):
    # A flat reference and a student with logit z on token 10 (second chunk), 0 on the other 11:
    # p = e^z / (e^z + 11), KL(p || uniform) = log 12 - H(p), by hand in float64.
    h, ref = torch.tensor([[z]]), torch.zeros(1, 1)
    w = torch.zeros(1, 12)
    w[0, 10] = 1.0
    q = 1 / (torch.tensor(z).double().exp() + 11)  # each other token; token 10 has 1 - 11 q
    entropy = -(1 - 11 * q) * torch.log1p(-11 * q) - 11 * q * q.log()
    kl, _ = reverse_kl_and_nll(h, ref, w, torch.tensor([10]))
    assert float(kl) == pytest.approx(float(torch.tensor(12.0).double().log() - entropy), abs=1e-5)


@pytest.mark.parametrize("known", [True, False])
def test_lazy_values_and_gradients_equal_float64(known):
    h, ref, w, targets, b = case(9, 16, 501, step=0.2, bias=True)
    upstream = torch.tensor([0.0, 1.5, 0, 0, -2, 0, 0, 0.25, 0]), torch.linspace(-1, 1, 9)
    ref_lse = logsumexp(ref, w, b) if known else None
    got, gradient = with_gradient(
        lambda x: reverse_kl_and_nll(x, ref, w, targets, bias=b, ref_lse=ref_lse, lazy=True),
        h,
        upstream,
    )
    exact, slope = with_gradient(
        lambda x: truth(x, ref, w, targets, b, "reverse"), h.double(), upstream
    )
    torch.testing.assert_close(got, exact, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, slope, atol=2e-5, rtol=1e-5)


def test_lazy_computes_the_kl_gradient_only_for_rows_with_an_upstream_gradient(monkeypatch):
    h, ref, w, targets, b = case(9, 16, 501, step=0.2, bias=True)
    real, rows = divergence.sweep, []

    def counting(student, delta, *args):
        if delta is not None:
            rows.append(len(student))
        return real(student, delta, *args)

    monkeypatch.setattr(divergence, "sweep", counting)
    leaf = h.clone().requires_grad_(True)
    kl, loss = reverse_kl_and_nll(leaf, ref, w, targets, bias=b, lazy=True)
    torch.autograd.grad(loss.sum(), leaf, retain_graph=True)
    assert rows == []
    torch.autograd.grad(torch.relu(kl - kl.detach().median()).sum(), leaf)
    assert rows == [4]  # of nine values four lie above their median


def test_ref_lse_without_lazy_is_rejected():
    h, ref, w, targets, _ = case()
    with pytest.raises(ShlError, match="lazy is False"):
        reverse_kl_and_nll(h, ref, w, targets, ref_lse=torch.zeros(5))


@pytest.mark.parametrize("way", WAYS)
def test_bias_counts_in_a_kl_of_hundreds_of_nats(chunks, way):
    h, ref, w, targets, _ = case(6, step=2.0)
    bias = 20 * torch.randn(23, generator=torch.Generator().manual_seed(7))
    h, ref = 40 * h, 40 * ref
    exact, _ = truth(h.double(), ref, w, targets, bias, way)
    without, _ = truth(h.double(), ref, w, targets, None, way)
    assert exact.max() > 100
    assert (exact - without).abs().max() > 1
    kl, _ = WAYS[way](h, ref, w, targets, bias=bias)
    assert torch.allclose(kl.double(), exact, rtol=1e-5, atol=1e-3)
