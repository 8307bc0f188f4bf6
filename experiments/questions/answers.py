"""The study's questions, answered from a run's record alone: no model is needed."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from experiments.questions.agreement import agreement
from experiments.questions.beyond import prompting, readable, selective
from experiments.questions.diagnostics import barrier, dose, ended, moved
from experiments.questions.estimates import Answer, all_of, paragraph
from experiments.questions.filtering import filters
from experiments.questions.healing import coherent, direction, heals
from experiments.questions.measurements import Measurements
from experiments.record.reader import Event
from shl.config import EvalConfig
from shl.method.axes import Axis

CLAIMS = (filters, heals, coherent, direction, prompting, selective)
"""The questions that must all be a yes for the method to have worked."""
DIAGNOSTICS = (readable, barrier, dose, moved, ended, agreement)


def answer_all(
    events: Sequence[Event], texts: Sequence[Event], axis: Axis, config: EvalConfig
) -> tuple[Answer, ...]:
    """Every question in order, the overall answer last; questions without data are undecided.
    `config` gives the resamples and the confidence of the intervals.

    Raises:
        ShlError: scores of different shapes.
    """
    m = Measurements(events, texts, axis, config)
    claims = [question(m) for question in CLAIMS]
    rest = [question(m) for question in DIAGNOSTICS]
    done = any(e["event"] == "end" for e in events)
    return (*claims, *(a for a in rest if a is not None), worked(claims, done=done))


def worked(claims: Sequence[Answer], *, done: bool) -> Answer:
    """Yes if every claim is a yes and the run is `done`; names the first that is not."""
    claims = [a for a in claims if a.verdict != "info"]
    verdict = all_of(a.verdict for a in claims)
    first = next((a for a in claims if a.verdict == verdict != "yes"), None)
    if verdict == "yes" and not done:
        verdict = "undecided"
    parts = [
        verdict,
        "" if done else "the run did not reach its last round, which allows no yes",
        f"first {verdict}: {first.key}, {first.question.rstrip('?')}" if first else "",
    ]
    for outcome in ("yes", "no", "undecided"):
        names = [a.key for a in claims if a.verdict == outcome]
        parts += [f"{outcome}: {', '.join(names)}"] if names else []
    figures = {a.key: a.verdict for a in claims} | {"done": done}
    found = [(a.key, a.deciding) for a in claims]
    estimates = tuple(replace(e, what=f"{key}: {e.what}") for key, e in found if e is not None)
    return Answer("worked", "did it work?", verdict, paragraph(parts), figures, {}, estimates)


def as_json(answers: Sequence[Answer]) -> dict[str, Any]:
    """Answers by key, in order: the content of answers.json."""
    names = ("key", "question", "verdict", "sentence", "figures", "thresholds")
    return {
        a.key: {name: getattr(a, name) for name in names}
        | {"deciding": a.deciding and a.deciding.as_json()}
        for a in answers
    }
