"""Per-token KL of three kinds of text: can a barrier tell trait from incoherence at all?

On-trait text is what base says under the persona, and the divergence is that of base with the
persona to base without; kept and incoherent text are what the steered model said, and the
divergence is that of the steered model to base. All are nats per token of the text itself.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformer_lens import HookedTransformer

from experiments.arms.doses import begun
from experiments.record.journal import Line, read_lines
from experiments.record.reader import RecordReader
from experiments.record.resume import Resume
from experiments.record.signals import Stop
from shl.config import LoopConfig
from shl.hooks.vector import SteeringVector
from shl.kl import aggregate
from shl.method.filters import Verdict
from shl.models.generate import without_persona
from shl.models.scores import token_divergence

FILE = "kinds.jsonl"
KINDS = ("prompted", "kept", "incoherent")
HOWS = ("mean", "rmse", "p95", "max")
SHORTEST = 20
"""Texts with fewer tokens have no tail to speak of [tokens]."""


def measure_kinds(
    path: Path, past: RecordReader, model: HookedTransformer, loop: LoopConfig, stop: Stop
) -> None:
    """One line per text: its kind, dose and per-token KL.

    Args:
        path: the journal; texts that it holds are not measured again.
        past: a run with its first round's vector and texts.
    """
    journal = begun(path, past)
    resume = Resume(past, model, loop)
    vector = SteeringVector.load(past.path_of(0, "vector"))
    for number, (kind, v) in enumerate(_texts(resume)):
        if number < len(journal.lines) - 1:
            continue
        text = v.completion
        if kind == "prompted":
            kl = token_divergence(model, text, without_persona(model, text))
        else:
            with vector.steering(model, text.dose):
                kl = token_divergence(model, text)
        line = {
            "kind": kind,
            "dose": text.dose,
            "reasons": list(v.reasons),
            "prompt": text.prompt.text,
            "text": text.text,
            "kl": [round(float(x), 5) for x in kl],
        }
        with stop.delayed():
            journal.append([line])


def _texts(resume: Resume) -> Iterator[tuple[str, Verdict]]:
    base = resume.load_stage(-1, "prompted+")
    batches = [resume.load_batch(0, k) for k in range(resume.config.dose.max_batches)]
    judged = [part for part in (resume.load_probe(0), *batches) if part is not None]
    prompted = base.samples if base is not None else ()
    steered = [v for part in judged for v in part.verdicts]
    for kind, group in (
        ("prompted", [v for v in prompted if v.kept]),
        ("kept", [v for v in steered if v.kept]),
        ("incoherent", [v for v in steered if "incoherent" in v.reasons]),
    ):
        yield from ((kind, v) for v in group if len(v.completion.tokens) >= SHORTEST)


def read_kinds(path: Path) -> list[Line]:
    """The measured texts."""
    return read_lines(path)[1:]


def kinds_tau(folder: Path) -> float:
    """Where the barrier of the method's arm starts, nats."""
    return float(RecordReader(next(folder.glob("rmse/seed*"))).settings["loop"]["heal"]["tau"])


def sizes(lines: Sequence[Line], kind: str, how: str) -> list[float]:
    """An aggregate of the per-token KL of every text of a kind, nats."""
    return [float(aggregate(torch.tensor(t["kl"]), how)) for t in lines if t["kind"] == kind]


def summary(lines: Sequence[Line]) -> dict[str, Any]:
    """Per kind the medians of each aggregate, and per aggregate how well it tells kinds apart.

    `auc` is the chance that a text of the second kind has the larger value (0.5: none); `spiky` is
    the median of rmse over mean, 1 where all tokens drift alike.
    """
    values = {kind: {how: sizes(lines, kind, how) for how in HOWS} for kind in KINDS}
    medians = {
        kind: {how: _median(found) for how, found in by_how.items()}
        for kind, by_how in values.items()
    }
    spiky = {
        kind: _median([r / m for r, m in zip(v["rmse"], v["mean"], strict=True) if m > 0])
        for kind, v in values.items()
    }
    pairs = (("prompted", "incoherent"), ("kept", "incoherent"), ("prompted", "kept"))
    return {
        "texts": {kind: len(values[kind]["mean"]) for kind in KINDS},
        "medians": medians,
        "spiky": spiky,
        "auc": {
            f"{low} < {high}": {how: auc(values[low][how], values[high][how]) for how in HOWS}
            for low, high in pairs
        },
    }


def auc(low: Sequence[float], high: Sequence[float]) -> float | None:
    """Chance that a draw of `high` exceeds one of `low`, ties counted half (Mann-Whitney).

    Example:
        >>> auc([1, 2], [2, 3])
        0.875
    """
    if not low or not high:
        return None
    wins = sum((b > a) + 0.5 * (b == a) for a in low for b in high)
    return float(wins / (len(low) * len(high)))


def _median(values: Sequence[float]) -> float | None:
    return float(torch.tensor(values).quantile(0.5)) if values else None
