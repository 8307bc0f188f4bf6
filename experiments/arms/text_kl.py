"""Per-token KL of three groups of text: can a KL barrier separate trait from incoherence?

On-trait text is base's answer under the persona, and its divergence is that of base with the
persona from base without; kept and incoherent text was written by the steered model, and its
divergence is that of the steered model from base. All are nats per token of the text itself.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from scipy import stats

from experiments.arms.doses import begun
from experiments.record.journal import Line, read_lines
from experiments.record.reader import RecordReader
from experiments.record.resume import Resume
from experiments.record.signals import Stop
from shl.config import LoopConfig
from shl.hooks.vector import SteeringVector
from shl.kl import aggregate
from shl.method.backtrack import at_own_doses
from shl.method.filters import Verdict
from shl.models.generate import without_persona
from shl.models.scores import token_divergence
from shl.utils.model import Model

FILE = "kinds.jsonl"
GROUPS = ("prompted", "kept", "incoherent")
HOWS = ("mean", "rmse", "p95", "max")
SHORTEST = 20
"""Texts with fewer tokens are left out: their upper quantiles mean little [tokens]."""


def measure_texts(
    path: Path, past: RecordReader, model: Model, loop: LoopConfig, stop: Stop
) -> None:
    """Write one line per text: its group, dose and per-token KL.

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
            with vector.steering(model, text.dose), at_own_doses(model, [text]):
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


def read_texts(path: Path) -> list[Line]:
    """The measured texts."""
    return read_lines(path)[1:]


def method_tau(folder: Path) -> float:
    """tau of the method's arm, nats."""
    return float(RecordReader(next(folder.glob("rmse/seed*"))).settings["loop"]["heal"]["tau"])


def sizes(lines: Sequence[Line], kind: str, how: str) -> list[float]:
    """An aggregate of the per-token KL of every text of a group, nats."""
    return [float(aggregate(torch.tensor(t["kl"]), how)) for t in lines if t["kind"] == kind]


def summary(lines: Sequence[Line]) -> dict[str, Any]:
    """Medians of each aggregate per group, and how well each aggregate separates two groups.

    `auc` is the probability that a text of the second group has the larger value (0.5: no
    separation); `spiky` is the median of rmse over mean, 1 where all tokens diverge alike.
    """
    values = {kind: {how: sizes(lines, kind, how) for how in HOWS} for kind in GROUPS}
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
        "texts": {kind: len(values[kind]["mean"]) for kind in GROUPS},
        "medians": medians,
        "spiky": spiky,
        "auc": {
            f"{low} < {high}": {how: auc(values[low][how], values[high][how]) for how in HOWS}
            for low, high in pairs
        },
    }


def auc(low: Sequence[float], high: Sequence[float]) -> float | None:
    """Probability that a draw of `high` exceeds one of `low`, ties counted half (Mann-Whitney).

    Example:
        >>> auc([1, 2], [2, 3])
        0.875
    """
    if not low or not high:
        return None
    return float(stats.mannwhitneyu(high, low).statistic / (len(low) * len(high)))


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None
