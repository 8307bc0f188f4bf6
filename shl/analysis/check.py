"""Sanity checks for a loaded model: parity, caching, steering, adapters, and hooks removed."""

from dataclasses import dataclass

import torch
from transformer_lens import HookedTransformer
from transformers import AutoModelForCausalLM

from shl.config import HealConfig
from shl.hooks.adapter import fresh_adapter
from shl.hooks.bake import baked
from shl.hooks.handle import handles_on
from shl.hooks.vector import SteeringVector
from shl.models.generate import generate, prefill, run
from shl.models.tokens import encode
from shl.models.weights import model_folder
from shl.utils.errors import ShlError
from shl.utils.seeds import generator_for

PROMPTS = ("What helps you fall asleep after an exciting day at the sea?", "Hi, how are you?")


@dataclass(frozen=True)
class CheckLine:
    """One check: the largest deviation (None if it could not be made), its limit, and a note."""

    what: str
    deviation: float | None
    allowed: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether it passed; a check that could not be made did not."""
        return self.deviation is not None and self.deviation <= self.allowed


@dataclass(frozen=True)
class CheckReport:
    """All checks of a model; prints as a table."""

    model_name: str
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
        return "\n".join([f"{self.model_name}", *rows])


@torch.no_grad()
def check(model: HookedTransformer) -> CheckReport:
    """Compare the model with transformers and with itself; takes seconds on a small one.

    Parity needs the folder or hub name that the model was loaded from. Hooks that the checks add
    are removed again.

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> report = check(tiny_gemma())
        >>> [line.what for line in report.lines if not line.ok]
        ['logits equal transformers']
    """
    before = len(handles_on(model))
    single_precision = model.W_U.dtype == torch.float32
    close = 1e-3 if single_precision else 2.0
    rows = [encode(model, prompt) for prompt in PROMPTS]
    whole = [model(torch.tensor([row], device=model.W_U.device))[0, -1].float() for row in rows]
    lines = [_parity(model, rows[0], whole[0], close)]

    batched = generate(model, PROMPTS, max_new_tokens=8, temperature=0.0)
    alone = [generate(model, [p], max_new_tokens=8, temperature=0.0)[0] for p in PROMPTS]
    differ = sum(a.tokens != b.tokens for a, b in zip(batched, alone, strict=True))
    lines.append(CheckLine("greedy texts in a batch equal those alone", float(differ), 0.0))

    residual, cache = prefill(model, [row[:-1] for row in rows])
    last = torch.tensor([[row[-1]] for row in rows], device=residual.device)
    after = run(model, last, torch.ones_like(last), cache)
    cached = model.unembed(model.ln_final(after))[:, 0].float()
    off = max(float((a - b).abs().max()) for a, b in zip(cached, whole, strict=True))
    lines.append(CheckLine("cached, padded logits equal whole ones", off, close))

    generator = generator_for(0, "check")
    directions = {
        layer: torch.randn(model.cfg.d_model, generator=generator)
        for layer in range(model.cfg.n_layers)
    }
    vector = SteeringVector(directions, str(model.cfg.model_name), "check", 1)
    tokens = torch.tensor([rows[0]], device=model.W_U.device)
    plain = model(tokens)
    with vector.steering(model, 0.0):
        lines.append(_same("steering at dose 0 changes nothing", model(tokens), plain))
    adapter = fresh_adapter(model, HealConfig(rank=2))
    with adapter.attach(model):
        lines.append(_same("a fresh adapter changes nothing", model(tokens), plain))
    for up in adapter.up.values():
        up.copy_(0.02 * torch.randn(up.shape, generator=generator))
    with baked(model, [adapter]):
        hooked = model(tokens)
    with baked(model, [adapter], materialise=True):
        inside = model(tokens)
    off = float((hooked - inside).float().abs().max())
    lines.append(CheckLine("an adapter as hooks equals it in the weights", off, close))
    lines.append(_same("base comes back", model(tokens), plain))
    left = float(len(handles_on(model)) - before)
    lines.append(CheckLine("no hook is left behind", left, 0.0))
    return CheckReport(str(model.cfg.model_name), tuple(lines))


def _same(what: str, got: torch.Tensor, expected: torch.Tensor) -> CheckLine:
    return CheckLine(what, float((got - expected).float().abs().max()), 0.0)


def _parity(
    model: HookedTransformer, row: list[int], ours: torch.Tensor, close: float
) -> CheckLine:
    what = "logits equal transformers"
    try:
        folder = model_folder(str(model.cfg.model_name))
    except ShlError as error:
        return CheckLine(what, None, close, str(error))
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=model.W_U.dtype).eval()
    theirs = hf.to(model.W_U.device)(torch.tensor([row], device=model.W_U.device)).logits[0, -1]
    return CheckLine(what, float((ours - theirs.float()).abs().max()), close)
