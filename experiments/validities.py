"""Which instruments of a run are valid, from its first lines alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.validity import Validity, validity
from shl.axes import Axis
from shl.config import EvalConfig

Event = Mapping[str, Any]


def validities(events: Sequence[Event], axis: Axis, config: EvalConfig) -> list[Validity]:
    """One verdict per instrument that read base and both personas; our vignettes first."""
    found = []
    for instrument in instruments(events):
        base, plus, minus = (
            line_of(events, instrument, stage) for stage in ("base", "prompted+", "prompted-")
        )
        if base is None or plus is None or minus is None:
            continue
        found.append(
            validity(
                instrument,
                scores(base),
                scores(plus),
                scores(minus),
                base["labels"],
                axis.expected,
                calibrated=calibrated(base),
                config=config,
            )
        )
    return found


def instruments(events: Sequence[Event]) -> list[str]:
    """Those that a record has readings of."""
    others = [e["instrument"] for e in events if e["event"] == "reading"]
    return list(dict.fromkeys(["vignettes", *others]))


def line_of(events: Sequence[Event], instrument: str, stage: str, index: int = -1) -> Event | None:
    """An instrument's line of one stage."""
    for e in events:
        own = "vignettes" if e["event"] == "stage" else e.get("instrument")
        reads = e["event"] in ("stage", "reading")
        if reads and (own, e["stage"], e["round"]) == (instrument, stage, index):
            return e
    return None


def scores(line: Event) -> np.ndarray:
    """`[item, paraphrase, foundation]` of a line, NaN where there was no answer."""
    return np.array(line["log_probs"], dtype=np.float64)


def calibrated(line: Event) -> bool:
    """Whether base's mean over vignettes has to come off: completions have a prior of their own."""
    return bool(line.get("style") == "completion")
