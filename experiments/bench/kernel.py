"""The KL and NLL kernel against two full logits and two log-softmaxes in plain torch."""

import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from experiments.bench import kernel_gpu
from experiments.bench.measure import Row, Timing, interleave, spread_note
from shl.kl import aggregate, logsumexp, reverse_kl_and_nll
from shl.kl.divergence import naive_kl_and_nll

TOKENS, D_MODEL, VOCAB = 256, 640, 262144
TAU = 0.0  # the barrier is open


def inputs(tokens: int, d_model: int, vocab: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h, h_ref, W_U and targets with logits of a plausible size (standard deviation 3)."""
    generator = torch.Generator().manual_seed(0)
    unembed = torch.randn(vocab, d_model, generator=generator).T / d_model**0.5
    reference = 3 * torch.randn(tokens, d_model, generator=generator)
    student = reference + 0.5 * torch.randn(tokens, d_model, generator=generator)
    return student, reference, unembed, torch.randint(vocab, (tokens,), generator=generator)


def step(
    kernel: Callable[[Tensor], tuple[Tensor, Tensor]], student: Tensor, name: str, tau: float
) -> Tensor:
    """Forward, aggregate, both terms' gradients apart, as training takes them."""
    h = student.detach().requires_grad_(True)
    kl, nll = kernel(h)
    (grad_nll,) = torch.autograd.grad(nll.mean(), h, retain_graph=True)
    (grad_kl,) = torch.autograd.grad(torch.relu(aggregate(kl, name) - tau), h)
    return grad_nll + grad_kl


def naive_step(student: Tensor, reference: Tensor, unembed: Tensor, targets: Tensor) -> Tensor:
    """The same with full logits, one backward."""
    h = student.detach().requires_grad_(True)
    kl, nll = naive_kl_and_nll(h, reference, unembed, targets)
    (nll.mean() + torch.relu(aggregate(kl, "rmse") - TAU)).backward()
    assert h.grad is not None
    return h.grad


def products(student: Tensor, unembed: Tensor, count: int) -> None:
    """The matrix products alone: half logits, half gradients, in chunks as the kernel's."""
    width = max(256, (1 << 20) // len(student))
    scores = torch.empty(len(student), width)
    out = torch.zeros_like(student)
    for piece in unembed.split(width, dim=1):
        part = scores[:, : piece.shape[1]]
        for _ in range(count // 2):
            torch.mm(student, piece, out=part)
            out.addmm_(part, piece.T)


def cases() -> tuple[dict[str, Callable[[], object]], Tensor]:
    """Everything that is compared, by name."""
    student, reference, unembed, targets = inputs(TOKENS, D_MODEL, VOCAB)
    ref_lse = logsumexp(reference, unembed, None)

    def eager(h: Tensor) -> tuple[Tensor, Tensor]:
        return reverse_kl_and_nll(h, reference, unembed, targets)

    def lazy(h: Tensor) -> tuple[Tensor, Tensor]:
        return reverse_kl_and_nll(h, reference, unembed, targets, ref_lse=ref_lse, lazy=True)

    return {
        "naive": lambda: naive_step(student, reference, unembed, targets),
        "eager": lambda: step(eager, student, "rmse", TAU),
        "lazy closed": lambda: step(lazy, student, "rmse", 1e9),
        "lazy p95": lambda: step(lazy, student, "p95", TAU),
        "floor 4": lambda: products(student, unembed, 4),
    }, student


def bench(repeats: int = 3) -> list[Row]:
    """CPU: one thread by CPU time; then all threads, alone and beside a busy process. Where there
    is a GPU, the GPU alone."""
    if torch.cuda.is_available():
        return kernel_gpu.rows()
    threads = torch.get_num_threads()
    compared, _ = cases()
    torch.set_num_threads(1)
    one = interleave(compared, repeats)
    torch.set_num_threads(threads)
    few = {k: compared[k] for k in ("naive", "eager")}
    many = interleave(few, repeats)
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        busy = interleave(few, repeats)
    finally:
        neighbour.kill()
        neighbour.wait()
    where = f"{TOKENS} x {D_MODEL} x {VOCAB}, fp32"

    def against(name: str, target: str) -> Row:
        ours, naive = one[name].least_cpu, one["naive"].least_cpu
        return Row(f"naive / {name}, 1 thread", naive / ours, target, ours, naive, "CPU s", where)

    def walls(t: dict[str, Timing], what: str) -> Row:
        ratio = t["naive"].seconds / t["eager"].seconds
        note = spread_note(*t.values())
        return Row(what, ratio, ">= 1", t["eager"].seconds, t["naive"].seconds, "s", note)

    return [
        against("eager", ">= 1.8"),
        against("lazy closed", ">= 3"),
        against("lazy p95", ">= 3"),
        Row(
            "share of the matrix-product floor, eager",
            one["floor 4"].least_cpu / one["eager"].least_cpu,
            ">= 0.85",
            one["eager"].least_cpu,
            one["floor 4"].least_cpu,
            "CPU s",
        ),
        walls(many, f"naive / eager, {threads} threads"),
        walls(busy, f"naive / eager, {threads} threads, busy neighbour"),
        Row(
            "extra memory, eager",
            one["eager"].peak_mb / one["naive"].peak_mb,
            "<= 40 MB",
            one["eager"].peak_mb,
            one["naive"].peak_mb,
            "MB",
        ),
        Row(
            "extra memory, lazy",
            one["lazy closed"].peak_mb / one["naive"].peak_mb,
            "<= 40 MB",
            one["lazy closed"].peak_mb,
            one["naive"].peak_mb,
            "MB",
        ),
        *kernel_gpu.rows(),
    ]
