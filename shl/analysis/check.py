"""Sanity checks for a loaded model: parity, caching, steering, adapters, and removal of hooks."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from shl.config import HealConfig
from shl.hooks.adapter import fresh_adapter
from shl.hooks.bake import baked
from shl.hooks.handle import handles_on
from shl.hooks.sites import engine_name
from shl.hooks.vector import SteeringVector
from shl.models.generate import generate, next_logits, prefill, run
from shl.models.tokens import encode
from shl.models.weights import model_folder
from shl.utils.errors import ShlError
from shl.utils.model import Model
from shl.utils.seeds import generator_for

PROMPTS = ("What helps you fall asleep after an exciting day at the sea?", "Hi, how are you?")


@dataclass(frozen=True)
class CheckLine:
    """One check: the largest deviation (None if it cannot be made), its limit, and a note."""

    what: str
    deviation: float | None
    allowed: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the check was made and passed."""
        return self.deviation is not None and self.deviation <= self.allowed


@dataclass(frozen=True)
class CheckReport:
    """All checks of a model; prints as a table.

    Attributes:
        engine: TransformerLens's class, and for a bridge whether its compatibility mode is on.
    """

    model_name: str
    engine: str
    lines: tuple[CheckLine, ...]

    @property
    def ok(self) -> bool:
        """Whether all checks passed."""
        return all(line.ok for line in self.lines)

    def __str__(self) -> str:
        rows = []
        for line in self.lines:
            verdict = "ok" if line.ok else "NOT CHECKED" if line.deviation is None else "FAILED"
            size = "" if line.deviation is None else f"{line.deviation:.1e} (<= {line.allowed:g})"
            rows.append(f"{line.what:<44} {verdict:<12} {size} {line.note}".rstrip())
        return "\n".join([f"{self.model_name} on a {self.engine}", *rows])


@torch.no_grad()
def check(model: Model) -> CheckReport:
    """Compare a model with transformers and with itself; this takes seconds on a small model.

    Parity needs the folder or hub name that the model was loaded from.

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> report = check(tiny_gemma())
        >>> [line.what for line in report.lines if not line.ok]
        ['logits equal transformers']
    """
    before = len(handles_on(model))
    close = 1e-3 if model.W_U.dtype == torch.float32 else 2.0
    rows = [encode(model, prompt) for prompt in PROMPTS]
    whole = [model(torch.tensor([row], device=model.W_U.device))[0, -1].float() for row in rows]
    lines = [_parity(model, rows[0], whole[0], close)]

    batched = generate(model, PROMPTS, max_new_tokens=8, temperature=0.0)
    alone = [generate(model, [p], max_new_tokens=8, temperature=0.0)[0] for p in PROMPTS]
    differ = sum(a.tokens != b.tokens for a, b in zip(batched, alone, strict=True))
    lines.append(CheckLine("greedy texts in a batch equal those alone", float(differ), 0.0))

    residual, cache = prefill(model, [row[:-1] for row in rows], reserve=1)
    last = torch.tensor([[row[-1]] for row in rows], device=residual.device)
    after = run(model, last, torch.ones_like(last), cache)
    cached = next_logits(model, after)[0]
    lines.append(_line("cached, padded logits equal whole ones", cached, torch.stack(whole), close))

    generator = generator_for(0, "check")
    layers = range(model.cfg.n_layers)
    directions = {i: torch.randn(model.cfg.d_model, generator=generator) for i in layers}
    vector = SteeringVector(directions, str(model.cfg.model_name), "check", 1)
    tokens = torch.tensor([rows[0]], device=model.W_U.device)
    plain = model(tokens)
    with vector.steering(model, 0.0):
        lines.append(_line("steering at dose 0 changes nothing", model(tokens), plain))
    adapter = fresh_adapter(model, HealConfig(rank=2))
    with adapter.attach(model):
        lines.append(_line("a fresh adapter changes nothing", model(tokens), plain))
    for up in adapter.up.values():
        up.copy_(0.02 * torch.randn(up.shape, generator=generator))
    with baked(model, [adapter]):
        hooked = model(tokens)
    with baked(model, [adapter], materialise=True):
        merged = model(tokens)
    lines.append(_line("an adapter as hooks equals merged weights", hooked, merged, close))
    lines.append(_line("logits return to those of base", model(tokens), plain))
    remaining = float(len(handles_on(model)) - before)
    lines.append(CheckLine("all added hooks are removed", remaining, 0.0))
    return CheckReport(str(model.cfg.model_name), engine_name(model), tuple(lines))


def _line(what: str, got: Tensor, expected: Tensor, allowed: float = 0.0) -> CheckLine:
    return CheckLine(what, float((got - expected).float().abs().max()), allowed)


def _parity(model: Model, row: list[int], ours: Tensor, close: float) -> CheckLine:
    what = "logits equal transformers"
    try:
        folder = model_folder(str(model.cfg.model_name))
    except ShlError as error:
        return CheckLine(what, None, close, str(error))
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=model.W_U.dtype).eval()
    theirs = hf.to(model.W_U.device)(torch.tensor([row], device=model.W_U.device)).logits[0, -1]
    return _line(what, ours, theirs.float(), close)
