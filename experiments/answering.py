"""From figures to an answer, and what several questions tell in the same words."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.measured import Measured
from experiments.shares import needed
from experiments.summary import Event
from experiments.thresholds import COHERENT
from experiments.verdicts import EXACT, SHARES, Answer, Figure, Verdict, all_of, sentence

NO_ROUND = "no round was finished"


def answer(
    m: Measured,
    key: str,
    question: str,
    figures: Sequence[Figure],
    thresholds: Mapping[str, float],
    *more: str,
    told: Mapping[str, Any] | None = None,
    verdict: Verdict | None = None,
) -> Answer:
    """All figures must hold, unless a `verdict` is given; a probe in doubt is said wherever the
    trait is read."""
    verdict = verdict or all_of(f.verdict for f in figures)
    doubt = m.doubt if any(f.trait for f in figures) else ""
    text = sentence(verdict, figures, *more, doubt)
    decided = {"decided": [f.told() for f in figures]}
    return Answer(key, question, verdict, text, decided | dict(told or {}), thresholds)


def missing(what: str, why: str) -> Figure:
    """A number that the record does not hold."""
    return Figure(what, None, None, None, 0.0, EXACT, note=why)


def too_few(m: Measured, figures: Sequence[Figure]) -> str:
    """How many samples a yes takes, where the survival of fewer leaves it undecided."""
    least = needed(COHERENT, m.config.confidence)
    count = len(m.samples(m.base))
    if count >= least or not any(f.by == SHARES and f.verdict == "undecided" for f in figures):
        return ""
    return f"{count} samples a stage cannot show {COHERENT:g}, it takes {least} with all kept"


def median(texts: Sequence[Event]) -> float | None:
    """Median base perplexity, None if it is infinite or there are no texts."""
    values = [perplexity(t) for t in texts]
    found = float(np.median(values)) if values else np.inf
    return found if np.isfinite(found) else None


def perplexity(text: Event) -> float:
    """An empty completion has none on record; it counts as the worst."""
    return np.inf if text["perplexity"] is None else float(text["perplexity"])
