"""The kernel on a GPU, at the shape of a 4b model: naive, compiled, Liger and shl in one run."""

import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from experiments.bench.measure import Row, Timing, extra_memory, interleave, speedup, spread_note
from shl.kl import aggregate, fused, logsumexp, reverse_kl_and_nll
from shl.kl.divergence import naive_kl_and_nll

TOKENS, D_MODEL, VOCAB = 4096, 2560, 262208
TAU = 0.0  # the barrier is open
TARGETS = {
    "naive / fused": ">= 1.3",
    "compiled naive / fused": "",
    "naive / torch sweep": "",
    "naive / lazy closed": ">= 2.2",
    "naive / lazy p95": "",
    "Liger / fused": ">= 2",
    "Liger, wider chunks / fused": ">= 2",
}
WHERE = f"{TOKENS} x {D_MODEL} x {VOCAB}, bf16"

Kernel = Callable[[Tensor], tuple[Tensor, Tensor]]
Cases = dict[str, Callable[[], Tensor]]


class Inputs(NamedTuple):
    """Hidden states of student and reference, unembedding `[d_model, vocab]` and targets."""

    student: Tensor
    reference: Tensor
    unembed: Tensor
    targets: Tensor


def inputs(tokens: int, d_model: int, vocab: int, device: str, dtype: torch.dtype) -> Inputs:
    """Random inputs whose logits have a standard deviation of 3."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    unembed = (normal(vocab, d_model) / d_model**0.5).to(dtype).T
    reference = (3 * normal(tokens, d_model)).to(dtype)
    student = reference + (0.5 * normal(tokens, d_model)).to(dtype)
    targets = torch.randint(vocab, (tokens,), generator=generator, device=device)
    return Inputs(student, reference, unembed, targets)


def gradient(kernel: Kernel, student: Tensor, how: str, tau: float) -> Tensor:
    """Gradient of mean NLL plus barrier with respect to the student's hidden states."""
    h = student.detach().requires_grad_(True)
    kl, nll = kernel(h)
    (nll.float().mean() + torch.relu(aggregate(kl.float(), how) - tau)).backward()
    assert h.grad is not None
    return h.grad


def cases(tokens: int, d_model: int, vocab: int, device: str, dtype: torch.dtype) -> Cases:
    """The kernels that are compared, by name."""
    student, reference, unembed, targets = inputs(tokens, d_model, vocab, device, dtype)
    ref_lse = logsumexp(reference, unembed, None)
    naive = partial(naive_kl_and_nll, ref=reference, unembed=unembed, targets=targets)
    ours = partial(reverse_kl_and_nll, ref=reference, unembed=unembed, targets=targets)
    lazy = partial(ours, ref_lse=ref_lse, lazy=True)
    compiled = torch.compile(naive)

    def triton(kernel: Kernel, how: str, tau: float) -> Tensor:
        with fused():
            return gradient(kernel, student, how, tau)

    def plain(kernel: Kernel, how: str, tau: float) -> Tensor:
        with fused(False):
            return gradient(kernel, student, how, tau)

    found: Cases = {
        "naive": lambda: gradient(naive, student, "rmse", TAU),
        "compiled naive": lambda: gradient(compiled, student, "rmse", TAU),
        "torch sweep": lambda: plain(ours, "rmse", TAU),
        "fused": lambda: triton(ours, "rmse", TAU),
        "lazy closed": lambda: triton(lazy, "rmse", 1e9),
        "lazy p95": lambda: triton(lazy, "p95", TAU),
    }
    if importlib.util.find_spec("liger_kernel"):
        found |= liger(student, reference, unembed)
    return found


def liger(student: Tensor, reference: Tensor, unembed: Tensor) -> Cases:
    """Liger's fused linear JSD at beta 1, the mean reverse KL: no NLL, nothing per token. Its
    chunks grow with a constant that it raises on the newest GPUs only."""
    from liger_kernel.ops import fused_linear_jsd as liger_jsd

    def run(capability: int | None) -> Tensor:
        h = student.detach().requires_grad_(True)
        before = liger_jsd._max_capability
        if capability is not None:
            liger_jsd._max_capability = lambda device=None: capability
        try:
            loss = liger_jsd.LigerFusedLinearJSDFunction.apply(
                h, unembed.T, reference, unembed.T, None, 1.0
            )
        finally:
            liger_jsd._max_capability = before
        loss.backward()
        assert h.grad is not None
        return h.grad

    return {"Liger": lambda: run(None), "Liger, wider chunks": lambda: run(100)}


def rows(repeats: int = 5) -> list[Row]:
    """Ratios of wall times; without a GPU every line says that it was not measured."""
    if not torch.cuda.is_available():
        return unmeasured("no CUDA device here")
    return rows_of(interleave(cases(TOKENS, D_MODEL, VOCAB, "cuda", torch.bfloat16), repeats))


def unmeasured(why: str) -> list[Row]:
    """The lines without figures."""
    out = [Row(f"GPU: {what}", None, target, note=why) for what, target in TARGETS.items()]
    return [*out, Row("GPU: extra memory, fused", None, "<= 512 MB", note=why)]


def rows_of(t: Mapping[str, Timing]) -> list[Row]:
    """The ratios of the timings; a peer that is not installed is listed without figures."""
    out = []
    for what, target in TARGETS.items():
        peer, mine = what.split(" / ")
        if peer not in t:
            out.append(Row(f"GPU: {what}", None, target, note="not installed"))
            continue
        note = f"{WHERE}, {spread_note(t[peer], t[mine])}"
        out.append(speedup(f"GPU: {what}", target, t[mine], t[peer], note))
    return [*out, extra_memory("GPU: extra memory, fused", "<= 512 MB", t["fused"], t["naive"])]
