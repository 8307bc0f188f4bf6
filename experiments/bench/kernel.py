"""The KL and NLL kernel against two full logits and two log-softmaxes in plain torch."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from experiments.bench import kernel_gpu
from experiments.bench.kernel_gpu import TAU, Kernel, gradient, inputs
from experiments.bench.measure import Row, cpu_speedup, extra_memory, interleave, speedup
from shl.kl import aggregate, logsumexp, reverse_kl_and_nll
from shl.kl.divergence import naive_kl_and_nll

TOKENS, D_MODEL, VOCAB = 256, 640, 262144


def step(kernel: Kernel, student: Tensor, name: str, tau: float) -> Tensor:
    """Gradients of NLL and barrier, one after the other as in training."""
    h = student.detach().requires_grad_(True)
    kl, nll = kernel(h)
    (grad_nll,) = torch.autograd.grad(nll.mean(), h, retain_graph=True)
    (grad_kl,) = torch.autograd.grad(torch.relu(aggregate(kl, name) - tau), h)
    return grad_nll + grad_kl


def products(student: Tensor, unembed: Tensor, count: int) -> None:
    """The matrix products alone, in chunks of the kernel's size: half logits, half gradients."""
    width = max(256, (1 << 20) // len(student))
    scores = torch.empty(len(student), width)
    out = torch.zeros_like(student)
    for piece in unembed.split(width, dim=1):
        part = scores[:, : piece.shape[1]]
        for _ in range(count // 2):
            torch.mm(student, piece, out=part)
            out.addmm_(part, piece.T)


def cases() -> dict[str, Callable[[], object]]:
    """The kernels that are compared, by name."""
    student, reference, unembed, targets = inputs(TOKENS, D_MODEL, VOCAB, "cpu", torch.float32)
    naive = partial(naive_kl_and_nll, ref=reference, unembed=unembed, targets=targets)
    eager = partial(reverse_kl_and_nll, ref=reference, unembed=unembed, targets=targets)
    lazy = partial(eager, ref_lse=logsumexp(reference, unembed, None), lazy=True)
    return {
        "naive": lambda: gradient(naive, student, "rmse", TAU),
        "eager": lambda: step(eager, student, "rmse", TAU),
        "lazy closed": lambda: step(lazy, student, "rmse", 1e9),
        "lazy p95": lambda: step(lazy, student, "p95", TAU),
        "floor 4": lambda: products(student, unembed, 4),
    }


def bench(repeats: int = 3) -> list[Row]:
    """With a GPU, its kernels alone; else CPU time with one thread, then wall time with all
    threads, alone and beside a busy process."""
    if torch.cuda.is_available():
        return kernel_gpu.rows()
    threads = torch.get_num_threads()
    compared = cases()
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
    naive, eager, lazy = one["naive"], one["eager"], one["lazy closed"]
    floor = "share of the matrix-product floor, eager"
    busy_name = f"naive / eager, {threads} threads, busy neighbour"
    return [
        cpu_speedup("naive / eager, 1 thread", ">= 1.8", eager, naive, where),
        cpu_speedup("naive / lazy closed, 1 thread", ">= 3", lazy, naive, where),
        cpu_speedup("naive / lazy p95, 1 thread", ">= 3", one["lazy p95"], naive, where),
        cpu_speedup(floor, ">= 0.85", eager, one["floor 4"]),
        speedup(f"naive / eager, {threads} threads", ">= 1", many["eager"], many["naive"]),
        speedup(busy_name, ">= 1", busy["eager"], busy["naive"]),
        extra_memory("extra memory, eager", "<= 40 MB", eager, naive),
        extra_memory("extra memory, lazy", "<= 40 MB", lazy, naive),
        *kernel_gpu.rows(),
    ]
