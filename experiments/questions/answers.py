"""The study's questions, answered from a run's record alone: no model is needed."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from experiments.questions.agreement import agreement
from experiments.questions.beyond import prompting, readable, selective
from experiments.questions.diagnostics import barrier, dose, ended, moved
from experiments.questions.estimates import Answer, all_of
from experiments.questions.filtering import filters
from experiments.questions.healing import coherent, direction, heals
from experiments.questions.measurements import Measured
from experiments.record.reader import Event
from shl.config import EvalConfig
from shl.method.axes import Axis

NEEDED = (filters, heals, coherent, direction, prompting, selective)
"""What must all be a yes for the method to have worked."""


def answer_all(
    events: Sequence[Event],
    texts: Sequence[Event],
    axis: Axis,
    config: EvalConfig | None = None,
) -> tuple[Answer, ...]:
    """Every question, in the order of reading, the whole at the end; an unfinished run is answered
    as far as it goes.

    Args:
        config: resamples and confidence of the intervals; the seed is fixed.

    Raises:
        ShlError: more resamples than can be held, or scores that do not belong together.
    """
    m = Measured(events, texts, axis, config or EvalConfig())
    claims = [ask(m) for ask in NEEDED]
    told = [ask(m) for ask in (readable, barrier, dose, moved, ended)]
    between = agreement(m)
    told += [] if between is None else [between]
    return (*claims, *told, worked(claims, done=any(e["event"] == "end" for e in events)))


def worked(claims: Sequence[Answer], *, done: bool) -> Answer:
    """Yes if every claim is one and the run is `done`; the first that is not is named."""
    asked = [a for a in claims if a.verdict != "told"]
    verdict = all_of(a.verdict for a in asked)
    first = next((a for a in asked if a.verdict == verdict), None)
    if verdict == "yes" and not done:
        verdict = "undecided"
    parts = [verdict.capitalize()]
    if not done:
        parts.append("The run did not reach its last round, which allows no yes")
    if first is not None and verdict == first.verdict and verdict != "yes":
        parts.append(f"The first {verdict} is {first.key} {first.question.rstrip('?')}")
    for kind in ("yes", "no", "undecided"):
        names = [a.key for a in asked if a.verdict == kind]
        parts += [f"{kind.capitalize()}: {', '.join(names)}"] if names else []
    figures = {a.key: a.verdict for a in claims} | {"done": done}
    return Answer("worked", "did it work?", verdict, ". ".join(parts) + ".", figures)


def as_json(found: Sequence[Answer]) -> dict[str, Any]:
    """By key, in order: what answers.json holds."""
    return {a.key: dataclasses.asdict(a) for a in found}
