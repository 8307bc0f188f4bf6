"""The cost of hooks in one decoding step, measured in turns."""

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch

from experiments.bench.measure import Row, Timing, timing
from shl.hooks.bake import fused_decoding
from shl.models.generate import next_logits, prefill, run
from shl.models.load import load_model
from shl.models.tokens import Prompt, encode
from shl.utils.model import Model

Hooks = Callable[[Model], AbstractContextManager[Any]]

TURNS = 25
CONTEXT = 20  # tokens before the first step


def model_per_case(name: str, hooks: Mapping[str, Hooks], stack: ExitStack) -> dict[str, Model]:
    """A model for each case, with its hooks on until `stack` closes; the embedding is shared."""
    models: dict[str, Any] = {}
    for case, attach in hooks.items():
        model: Any = load_model(name, engine="hooked")
        if models:
            first = next(iter(models.values()))
            model.embed.W_E.data = first.embed.W_E.data
            model.unembed.W_U = first.unembed.W_U
        stack.enter_context(attach(model))
        models[case] = model
    return models


@torch.no_grad()
def steps(models: Mapping[str, Model], prompts: list[Prompt]) -> dict[str, Timing]:
    """Wall and CPU time of a greedy step, its logits included: each case once per turn."""
    caches = {}
    stack = ExitStack()
    for case, model in models.items():
        rows = [encode(model, p)[:CONTEXT] for p in prompts]
        caches[case] = prefill(model, rows, reserve=2 * TURNS)[1]
        stack.enter_context(fused_decoding(model))
    tokens = torch.full((len(prompts), 1), 1000, device=next(iter(models.values())).W_U.device)
    measured: dict[str, list[tuple[float, float, float]]] = {case: [] for case in models}
    with stack:
        for turn in range(TURNS + 3):
            for case, model in models.items():
                wall, cpu = time.perf_counter(), time.process_time()
                residual = run(model, tokens, torch.ones_like(tokens), caches[case])
                float(next_logits(model, residual, k=3)[0].sum())  # waits for a GPU
                if turn >= 3:
                    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                    measured[case].append((wall, cpu, 0.0))
    return {case: timing(turns) for case, turns in measured.items()}


def row(what: str, with_hooks: Timing, without: Timing, target: str) -> Row:
    """The median over turns of the ratio within a turn."""
    pairs = zip(with_hooks.wall, without.wall, strict=True)
    low, middle, high = statistics.quantiles([a / b for a, b in pairs], n=4)
    note = f"half of {TURNS} turns within {low:.2f} to {high:.2f}"
    return Row(what, middle, target, 1e3 * with_hooks.seconds, 1e3 * without.seconds, "ms", note)
