"""Validity of every instrument of a run, and whether valid ones agree with the vignettes."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from scipy.special import log_softmax

from experiments.questions.estimates import Answer, paragraph, spearman
from experiments.questions.measurements import Measurements
from experiments.record.reader import Event
from experiments.record.resume import scores
from experiments.record.schema import name_of
from shl.config import EvalConfig
from shl.measure.evaluation import nats_of
from shl.measure.validity import Validity, validity
from shl.method.axes import Axis
from shl.utils.errors import require
from shl.utils.seeds import seed_for


def validities(events: Sequence[Event], axis: Axis, config: EvalConfig) -> list[Validity]:
    """The validity of each instrument that measured base and both personas; the vignettes first."""
    found = []
    for name in instruments(events):
        lines = [line_of(events, name, stage) for stage in ("base", "prompted+", "prompted-")]
        present = [line for line in lines if line is not None]
        if len(present) < 3:
            continue
        base, plus, minus = map(scores, present)
        style, labels = present[0].get("style"), present[0]["labels"]
        check = partial(validity, name, calibrated=style == "completion", config=config)
        found.append(check(base, plus, minus, labels, axis.expected))
    return found


def instruments(events: Sequence[Event]) -> list[str]:
    """The instruments of a record; the vignettes, which every run has, come first."""
    others = [e["instrument"] for e in events if e["event"] == "reading"]
    return list(dict.fromkeys(["vignettes", *others]))


def line_of(events: Sequence[Event], instrument: str, stage: str, index: int = -1) -> Event | None:
    """An instrument's line of one stage."""
    name = stage if instrument == "vignettes" else f"{instrument}:{stage}"
    return next((e for e in events if (name_of(e), e["round"]) == (name, index)), None)


READOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "log mean probability": nats_of,
    "mean log-probability": lambda x: x.mean(0),
    "mean log-ratio": lambda x: (x - x.mean(-1, keepdims=True)).mean(0),
}
"""`[item, foundation]` log-probabilities to one number per foundation."""


def agree(
    one: Sequence[np.ndarray],
    other: Sequence[np.ndarray],
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Spearman's rank correlation of two instruments' shifts, with its interval.

    The readout is the one that agrees best on one half of either's items; the correlation is that
    of the other half, with a bootstrap interval over that half's items.

    Args:
        one, other: log-probabilities `[item, foundation]` of base and of each stage.

    Raises:
        ShlError: different numbers of stages, or fewer than four items.
    """
    require(
        len(one) == len(other),
        f"the instruments have {len(one) - 1} and {len(other) - 1} stages, they must be the same.",
    )
    rng = np.random.default_rng(seed_for(0, "concord"))
    halves = []
    for base, *_ in (one, other):
        count = len(base)
        require(count >= 4, f"{count} items cannot be split in halves, at least 4 are needed.")
        order = rng.permutation(count)
        halves.append((order[: count // 2], order[count // 2 :]))
    (choose_a, test_a), (choose_b, test_b) = halves

    def rho(readout: str, a: np.ndarray, b: np.ndarray) -> float:
        return spearman(shifts(one, readout, a), shifts(other, readout, b))

    best = max(READOUTS, key=lambda name: rho(name, choose_a, choose_b))
    draws = [
        rho(best, rng.choice(test_a, len(test_a)), rng.choice(test_b, len(test_b)))
        for _ in range(resamples)
    ]
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return {
        "spearman": rho(best, test_a, test_b),
        "interval": (float(low), float(high)),
        "readout": best,
        "shifts": len(shifts(one, best, test_a)),
        "confidence": confidence,
    }


def shifts(readings: Sequence[np.ndarray], readout: str, items: np.ndarray) -> np.ndarray:
    """Shift from base per stage and foundation, on some items, in one row."""
    base, *rest = (READOUTS[readout](x[items]) for x in readings)
    return np.concatenate([x - base for x in rest])


def agreement(m: Measurements) -> Answer | None:
    """Agreement of each other instrument with the vignettes, where both are valid; None where the
    vignettes are the only one."""
    others = instruments(m.events)[1:]
    if not others:
        return None
    valid = {v.instrument: v for v in validities(m.events, m.axis, m.config)}
    measured = [(e["stage"], e["round"]) for e in m.events if e["event"] == "stage"]
    compare = partial(agree, resamples=m.config.bootstrap, confidence=m.config.confidence)
    parts: list[str] = []
    figures: dict[str, Any] = {}
    for name in others:
        stages = [s for s in measured if s[0] != "base" and line_of(m.events, name, *s)]
        invalid = [v for v in (valid.get("vignettes"), valid.get(name)) if v and not v.valid]
        if name not in valid or not stages:
            reason = "no stage beside base has been measured by both yet"
        elif invalid:
            reasons = [f"{v.instrument} is not valid here: {v.reason}" for v in invalid]
            reason = f"no agreement is claimed; {' '.join(reasons)}"
        else:
            found = compare(*(_readings(m.events, n, stages) for n in ("vignettes", name)))
            reason, figures[name] = _sentence(found), found
        figures.setdefault(name, {"reason": reason})
        parts.append(f"{name}: {reason}")
    text, question = paragraph(parts), "do the instruments agree?"
    return Answer("agreement", question, "info", text, figures)


def _sentence(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return (
        f"Spearman {found['spearman']:.2f} ({100 * found['confidence']:g} % {low:+.2f} to "
        f"{high:+.2f}) over {found['shifts']} shifts, {found['readout']}, on held-out items"
    )


def _readings(
    events: Sequence[Event], name: str, stages: Sequence[tuple[str, int]]
) -> list[np.ndarray]:
    """An instrument's log-probabilities of base and of stages, `[item, foundation]`, without the
    items that lack an answer in any."""
    found = (line_of(events, name, *stage) for stage in (("base", -1), *stages))
    lines = [line for line in found if line is not None]
    raw = [scores(line) for line in lines]
    answered = np.all([~np.isnan(x).any((1, 2)) for x in raw], axis=0)
    raw = [x[answered] for x in raw]
    # Completions have a prior of their own, base's mean over vignettes.
    prior = raw[0].mean(0) if lines[0].get("style") == "completion" else 0.0
    return [log_softmax((x - prior).mean(1), axis=-1) for x in raw]
