"""Whether the other instruments of a run agree with our vignettes."""

from collections.abc import Sequence

import numpy as np

from experiments.concord import Concord, Reading, concord
from experiments.measured import Measured
from experiments.summary import Event
from experiments.validities import calibrated, instruments, line_of, scores, validities
from experiments.verdicts import Answer


def agreement(m: Measured) -> Answer | None:
    """Spearman of the shifts that two instruments read, where both are valid; None where our
    vignettes are the only one."""
    others = [name for name in instruments(m.events) if name != "vignettes"]
    if not others:
        return None
    valid = {v.instrument: v for v in validities(m.events, m.axis, m.config)}
    parts, figures = [], {}
    for name in others:
        stages = _both(m.events, name)
        if name not in valid or not stages:
            said: Concord | str = "no stage beside base has been read by both yet"
        else:
            said = concord(
                _reading(m.events, "vignettes", stages),
                _reading(m.events, name, stages),
                (valid["vignettes"], valid[name]),
                resamples=m.config.bootstrap,
                confidence=m.config.confidence,
            )
        parts.append(f"{name}: {str(said).rstrip('.')}.")
        figures[name] = vars(said) if isinstance(said, Concord) else {"reason": said}
    return Answer("agreement", "do the instruments agree?", "told", " ".join(parts), figures)


def _both(events: Sequence[Event], name: str) -> list[tuple[str, int]]:
    """Stages beside base that our vignettes and another instrument have read."""
    found = [(e["stage"], e["round"]) for e in events if e["event"] == "stage"]
    return [
        (stage, index)
        for stage, index in found
        if stage != "base" and line_of(events, name, stage, index) is not None
    ]


def _reading(events: Sequence[Event], name: str, stages: Sequence[tuple[str, int]]) -> Reading:
    """An instrument on base and on these stages, items without an answer in any left out."""
    base = line_of(events, name, "base")
    assert base is not None
    lines = [line_of(events, name, stage, index) for stage, index in stages]
    every = [scores(line) for line in (base, *lines) if line is not None]
    answered = np.all([~np.isnan(x).any((1, 2)) for x in every], axis=0)
    first, *rest = (x[answered] for x in every)
    named = {f"{stage} {index}": x for (stage, index), x in zip(stages, rest, strict=True)}
    return Reading.of(first, named, calibrated=calibrated(base))
