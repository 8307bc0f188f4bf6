"""Per-token KL and NLL from final hidden states, without a `[tok, vocab]` tensor, and aggregates.

Student and reference share one frozen unembedding W, so their logits differ by u = delta W, where
delta = h - h_ref. With p = softmax(h W), q = softmax(h_ref W), F = logsumexp, A = E_p[W]:

    KL(p || q) = delta . A - F(h) + F(h_ref)          a Bregman divergence of F
               = log E_p[exp(ubar - u)],  ubar = E_p[u]
    grad NLL   = A - W[:, y]
    grad KL    = E_p[(u - ubar) W] = Cov_p[W] delta

A teacher t with the same unembedding can take the place of the target tokens. With A_t = E_t[W]:

    KL(t || p) = F(h) - F(h_t) - (h - h_t) . A_t,   grad = A - A_t

One sweep over vocabulary chunks with an online logsumexp gives both values and both gradients.
"""

import os
import shutil
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shl.config import quantile_of
from shl.kl.sweep import Bias, Sweep, logsumexp, logsumexp_and_max, product, sweep
from shl.utils.errors import ShlError, require
from shl.utils.shapes import Bool, Float, Hidden, Int, PerToken, Targets, Unembed


def naive_kl_and_nll(
    student: Hidden,
    ref: Hidden,
    unembed: Unembed,
    targets: Targets,
    *,
    bias: Bias = None,
    reverse: bool = True,
    soft_cap: float = 0.0,
) -> tuple[PerToken, PerToken]:
    """The direct computation from two full logits and log-softmaxes, in the inputs' dtype.

    For tests, benchmarks, and models that soft-cap their logits.
    """
    log_p = full_log_probs(student, unembed, bias, soft_cap)
    log_q = full_log_probs(ref, unembed, bias, soft_cap)
    left, right = (log_p, log_q) if reverse else (log_q, log_p)
    kl = (left.exp() * (left - right)).sum(1)
    return kl, -log_p.gather(1, targets[:, None])[:, 0]


def full_log_probs(
    h: Tensor, unembed: Tensor, bias: Tensor | None, soft_cap: float = 0.0
) -> Tensor:
    """Log-probabilities `[tok, vocab]` in the inputs' dtype, capped before the softmax if
    `soft_cap` is above 0."""
    return _normalised(h @ unembed, bias, soft_cap)


def fp32_log_probs(
    h: Tensor, unembed: Tensor, bias: Tensor | None, soft_cap: float = 0.0
) -> Tensor:
    """`full_log_probs` in fp32 from weights of any dtype, which are not copied on a GPU.

    Example:
        >>> h, w = torch.zeros(1, 2, dtype=torch.bfloat16), torch.zeros(2, 4, dtype=torch.bfloat16)
        >>> fp32_log_probs(h, w, None).exp()
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    return _normalised(product(h, unembed), bias, soft_cap)


def _normalised(logits: Tensor, bias: Tensor | None, soft_cap: float) -> Tensor:
    if bias is not None:
        logits = logits + bias
    if soft_cap > 0:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    return logits.log_softmax(1)


@dataclass(frozen=True, eq=False)
class SoftTargets:
    """A teacher's next-token distributions, as far as KL(teacher || student) depends on them.

    `mean_w` is A_t = E_t[W] per token, `offset` is F(h_t) - h_t . A_t (nats).
    """

    mean_w: Hidden
    offset: PerToken

    def __getitem__(self, tokens: slice) -> "SoftTargets":
        """The targets of a range of tokens."""
        return SoftTargets(self.mean_w[tokens], self.offset[tokens])


def ids_for_full_logits(targets: Tensor | SoftTargets, soft_cap: float) -> Tensor:
    """Warn, at the caller's caller, that full logits are formed; `targets`, which must be ids."""
    if isinstance(targets, SoftTargets):
        raise ShlError(f"soft_cap is {soft_cap:g}, soft targets need logits without a cap.")
    warnings.warn(
        f"the logits are soft-capped at {soft_cap:g}, so they are formed in full: slow, and "
        "[tok, vocab] in memory.",
        stacklevel=3,
    )
    return targets


_FUSED: ContextVar[bool | None] = ContextVar("shl_fused", default=None)


@contextmanager
def fused(on: bool = True) -> Iterator[None]:
    """Use the Triton kernel for the elementwise part of the sweeps inside the body, or with `on`
    False torch's operations.

    By default the kernel is used on CUDA where the `triton` package, a C compiler and Python's
    headers are installed, with which Triton builds its launcher. On a CPU it runs in Triton's
    interpreter, for tests.
    """
    token = _FUSED.set(on)
    try:
        yield
    finally:
        _FUSED.reset(token)


@cache
def _has_triton() -> bool:
    compiler = os.environ.get("CC") or shutil.which("clang") or shutil.which("gcc")
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return find_spec("triton") is not None and compiler is not None and headers.is_file()


def _sweep(
    h: Hidden,
    delta: Hidden | None,
    unembed: Unembed,
    bias: Bias,
    mean_w: Hidden | None = None,
    *,
    on: bool | None = None,
) -> Sweep:
    on = _FUSED.get() if on is None else on
    if on or (on is None and h.is_cuda and _has_triton()):
        # Triton is an optional dependency and slow to import.
        from shl.kl.triton import fused_sweep

        return fused_sweep(h, delta, unembed, bias, mean_w)
    return sweep(h, delta, unembed, bias, mean_w)


def soft_targets(
    teacher: Hidden, unembed: Unembed, *, bias: Bias = None, soft_cap: float = 0.0
) -> SoftTargets:
    """Make targets of a teacher's final hidden states: one sweep, without allocating logits.

    Given in place of token ids, they turn a function's NLL into KL(teacher || student), at the
    NLL's cost. Distillation with soft targets: Hinton et al. 2015, arXiv:1503.02531.

    Args:
        teacher: `[tok, d_model]`, final hidden states after the norm.
        unembed: `[d_model, vocab]`, that of the student.
        bias: `[vocab]`, if it is not 0.
        soft_cap: must be 0.

    Raises:
        ShlError: soft-capped logits, of which no such summary exists.

    Example:
        >>> import torch
        >>> h, w = torch.randn(3, 4), torch.randn(4, 11)
        >>> differentiable_nll(h, w, soft_targets(h, w)).abs().max() < 1e-5
        tensor(True)
    """
    require(soft_cap == 0, f"soft_cap is {soft_cap:g}, soft targets need logits without a cap.")
    with torch.no_grad():
        at = _sweep(teacher, None, unembed, bias)
        return SoftTargets(at.mean_w, at.lse - (teacher.float() * at.mean_w).sum(1))


class Divergence(torch.autograd.Function):
    """(kl, nll) whose backward scales gradients that forward has computed.

    With `lazy` the KL's gradient is computed in backward, for rows with a non-zero upstream
    gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        h_ref: Tensor | None,
        unembed: Tensor,
        targets: Tensor | SoftTargets,
        bias: Tensor | None,
        reverse: bool,
        ref_lse: Tensor | None,
        lazy: bool,
    ) -> tuple[Tensor, Tensor]:
        """KL and NLL per token, `[tok]` each; without a reference the KL is 0."""
        student = h.detach().float()
        # Subtract before the product: the difference of two large logits would lose precision.
        delta = None if h_ref is None else student - h_ref.detach().float()
        kl = torch.zeros(len(student), device=student.device)
        grad_kl = torch.zeros_like(student)
        if h_ref is None or delta is None:
            at_student = _sweep(student, None, unembed, bias)
        elif not reverse:
            at_student = _sweep(student, None, unembed, bias)
            at_ref = _sweep(h_ref.detach(), -delta, unembed, bias)
            assert at_ref.kl is not None
            kl, grad_kl = at_ref.kl, at_student.mean_w - at_ref.mean_w
        elif lazy:
            at_student = _sweep(student, None, unembed, bias)
            ref_lse = logsumexp(h_ref, unembed, bias) if ref_lse is None else ref_lse
            kl = (delta * at_student.mean_w).sum(1) - at_student.lse + ref_lse
        else:
            at_student = _sweep(student, delta, unembed, bias)
            assert at_student.kl is not None
            assert at_student.grad_kl is not None
            kl, grad_kl = at_student.kl, at_student.grad_kl
        if isinstance(targets, SoftTargets):
            target_w, offset = targets.mean_w, targets.offset
        else:
            target_w = unembed.T[targets].float()
            offset = student.new_zeros(()) if bias is None else bias[targets].float()
        nll = at_student.lse - (student * target_w).sum(1) - offset
        ctx.lazy = lazy and reverse and delta is not None
        # On CUDA backward runs in a thread of its own, where the variable has its default.
        ctx.fused = _FUSED.get()
        ctx.save_for_backward(grad_kl, at_student.mean_w, target_w, student, delta, unembed, bias)
        ctx.dtype = h.dtype
        return kl, nll

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of `h`, `[tok, d]`, from those of KL and NLL, `[tok]` each."""
        grad_kl, mean_w, target_w, student, delta, unembed, bias = ctx.saved_tensors
        kl_up, nll_up = upstream
        if ctx.lazy:
            rows = kl_up.nonzero()[:, 0]
            if len(rows):
                picked = student[rows], delta[rows], unembed, bias, mean_w[rows]
                part = _sweep(*picked, on=ctx.fused)
                assert part.grad_kl is not None
                grad_kl = grad_kl.index_copy(0, rows, part.grad_kl)
        grad = kl_up[:, None] * grad_kl + nll_up[:, None] * (mean_w - target_w)
        return grad.to(ctx.dtype), None, None, None, None, None, None, None


def aggregate(kl: PerToken, how: str) -> Float[Tensor, ""]:
    """The aggregate D of a completion's per-token divergences, in nats.

    Args:
        kl: `[tok]`, nats.
        how: `mean`, `rmse` = sqrt(mean(kl^2)), `max`, or `pNN`, the linearly interpolated
            quantile. At all-zero `kl` the gradient of rmse is exactly 0.

    Raises:
        ShlError: `kl` is empty, or the aggregate is unknown.

    Example:
        >>> import torch
        >>> kl = torch.tensor([0.0] * 56 + [3.8, 4.2, 6.7, 8.1])
        >>> [round(float(aggregate(kl, how)), 2) for how in ("mean", "rmse", "p95", "max")]
        [0.38, 1.54, 3.82, 8.1]
    """
    require(len(kl) > 0, "a completion without tokens has no divergence, kl must not be empty.")
    if how == "mean":
        return kl.mean()
    if how == "rmse":
        # vector_norm's gradient at the origin is 0; that of sqrt is infinite.
        return torch.linalg.vector_norm(kl) / len(kl) ** 0.5
    if how == "max":
        return kl.amax()
    quantile = quantile_of(how)
    if quantile is None:
        raise ShlError(f"aggregate is {how!r}, it must be 'mean', 'rmse', 'max' or 'pNN'.")
    return torch.quantile(kl, quantile)


def reverse_kl_and_nll(
    student: Hidden,
    ref: Hidden,
    unembed: Unembed,
    targets: Targets | SoftTargets,
    *,
    bias: Bias = None,
    ref_lse: PerToken | None = None,
    lazy: bool = False,
    soft_cap: float = 0.0,
) -> tuple[PerToken, PerToken]:
    """KL(student || reference) and -log p_student(target) per token, without allocating logits.

    Args:
        student: `[tok, d_model]`, final hidden states after the norm; the only input that gets a
            gradient.
        ref: `[tok, d_model]`, the reference's, with the same unembedding.
        unembed: `[d_model, vocab]`, TransformerLens's `W_U`, frozen.
        targets: `[tok]`, the next token at each position; or `soft_targets`, which make nll
            KL(teacher || student) instead.
        bias: `[vocab]`, TransformerLens's `b_U`, if it is not 0.
        ref_lse: `[tok]`, `logsumexp` of the reference's logits, if known; only with `lazy`.
        lazy: compute the KL's gradient in backward, only for rows with a non-zero upstream
            gradient. It takes two products over the vocabulary (with `ref_lse`), and three more for
            those rows, instead of four. The KL's absolute error is then up to 1e-5 in fp32.
        soft_cap: if above 0, logits become cap * tanh(logits / cap). They are then not linear in h,
            so full logits are formed, with a warning.

    Raises:
        ShlError: `ref_lse` is given without `lazy`, or `lazy` with `soft_cap`.

    Returns:
        kl and nll, `[tok]` each, in nats and fp32.

    Example:
        >>> import torch
        >>> h, w = torch.randn(3, 4), torch.randn(4, 11)
        >>> kl, nll = reverse_kl_and_nll(h, h, w, torch.tensor([0, 5, 10]))
        >>> kl
        tensor([0., 0., 0.])
    """
    require(lazy or ref_lse is None, "ref_lse is given but lazy is False, which does not use it.")
    if soft_cap > 0:
        require(
            not lazy, f"lazy is True with soft_cap {soft_cap:g}, which forms full logits at once."
        )
        ids = ids_for_full_logits(targets, soft_cap)
        return naive_kl_and_nll(student, ref.detach(), unembed, ids, bias=bias, soft_cap=soft_cap)
    return Divergence.apply(student, ref, unembed, targets, bias, True, ref_lse, lazy)


def forward_kl_and_nll(
    student: Hidden,
    ref: Hidden,
    unembed: Unembed,
    targets: Targets | SoftTargets,
    *,
    bias: Bias = None,
    soft_cap: float = 0.0,
) -> tuple[PerToken, PerToken]:
    """KL(reference || student) and NLL per token; arguments as in `reverse_kl_and_nll`."""
    if soft_cap > 0:
        ids = ids_for_full_logits(targets, soft_cap)
        return naive_kl_and_nll(
            student, ref.detach(), unembed, ids, bias=bias, reverse=False, soft_cap=soft_cap
        )
    return Divergence.apply(student, ref, unembed, targets, bias, False, None, False)


def differentiable_nll(
    student: Hidden,
    unembed: Unembed,
    targets: Targets | SoftTargets,
    *,
    bias: Bias = None,
    soft_cap: float = 0.0,
) -> PerToken:
    """NLL per token with its gradient, at half the cost of a divergence."""
    if soft_cap > 0:
        ids = ids_for_full_logits(targets, soft_cap)
        log_p = full_log_probs(student, unembed, bias, soft_cap)
        return -log_p.gather(1, ids[:, None])[:, 0]
    return Divergence.apply(student, None, unembed, targets, bias, True, None, False)[1]


def nll(
    student: Hidden, unembed: Unembed, targets: Targets, *, bias: Bias = None, soft_cap: float = 0.0
) -> PerToken:
    """-log p(target) per token in nats, in chunks and without a gradient, for scoring.

    Example:
        >>> import torch
        >>> round(float(nll(torch.zeros(1, 4), torch.randn(4, 10), torch.tensor([3])).exp()), 4)
        10.0
    """
    return -log_probs_at(student, unembed, targets[:, None], bias=bias, soft_cap=soft_cap)[:, 0]


@torch.no_grad()
def nll_and_top(
    student: Hidden, unembed: Unembed, targets: Targets, *, bias: Bias = None, soft_cap: float = 0.0
) -> tuple[PerToken, PerToken]:
    """`nll`, and the largest probability at each position, by the same product.

    Example:
        >>> loss, top = nll_and_top(torch.zeros(1, 4), torch.randn(4, 10), torch.tensor([3]))
        >>> round(float(top), 4)
        0.1
    """
    if soft_cap > 0:
        ids = ids_for_full_logits(targets, soft_cap)
        log_p = fp32_log_probs(student, unembed, bias, soft_cap)
        return -log_p.gather(1, ids[:, None])[:, 0], log_p.amax(1).exp()
    lse, largest = logsumexp_and_max(student, unembed, bias, scoring=True)
    chosen = (student.float() * unembed.T[targets].float()).sum(1)
    if bias is not None:
        chosen = chosen + bias[targets].float()
    return lse - chosen, (largest - lse).exp()


def log_probs_at(
    student: Hidden,
    unembed: Unembed,
    tokens: Int[Tensor, "tok n"],
    *,
    bias: Bias = None,
    soft_cap: float = 0.0,
    relative: Bool[Tensor, "tok"] | None = None,
) -> Float[Tensor, "tok n"]:
    """Log-probabilities (nats, fp32) of given tokens `[tok, n]` at each position, in chunks and
    without a gradient.

    Args:
        relative: positions at which only differences between the tokens matter, and the sum over
            the vocabulary, which costs most, is left out.
    """
    with torch.no_grad():
        if soft_cap > 0:
            tokens = ids_for_full_logits(tokens, soft_cap)
            return fp32_log_probs(student, unembed, bias, soft_cap).gather(1, tokens)
        chosen = torch.einsum("td,tnd->tn", student.float(), unembed.T[tokens].float())
        if bias is not None:
            chosen = chosen + bias[tokens].float()
        whole = slice(None) if relative is None else ~relative
        if len(student[whole]):
            chosen[whole] -= logsumexp(student[whole], unembed, bias, scoring=True)[:, None]
        return chosen
