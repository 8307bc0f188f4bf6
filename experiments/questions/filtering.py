"""Q0: can the filter tell what the dose breaks, and does what it keeps carry the trait?"""

from collections.abc import Sequence

import numpy as np

from experiments.questions.estimates import (
    SHARES,
    TEXTS,
    Answer,
    Figure,
    difference,
    number,
    rank_correlation,
)
from experiments.questions.measurements import Measured, answer, median, missing, perplexity
from experiments.questions.thresholds import FALLS, MOVES, RISES
from experiments.record.reader import Event
from shl.measure.stats import bootstrap


def filters(m: Measured) -> Answer:
    """Q0: does survival fall and perplexity rise with the dose, and is what is kept on-trait?"""
    probes = [t for t in m.texts if t["stage"] == "probe" and t["round"] == 0]
    doses = sorted({t["dose"] for t in probes}, key=abs)
    figures, rungs, listed = [], [], ""
    if len(doses) < 2:
        why = "doses were not probed: the walk was off, or has not begun"
        figures.append(missing("trend over the dose ladder", why))
    else:
        ladder = [[t for t in probes if t["dose"] == dose] for dose in doses]
        figures += [_falls(m, ladder), _rises(m, probes)]
        rungs = [_rung(dose, group) for dose, group in zip(doses, ladder, strict=True)]
        listed = "kept and median base perplexity by dose " + ", ".join(
            f"{r['dose']:.2f}: {r['kept']}/{r['generated']} {number(r['perplexity'])}"
            for r in rungs
        )
    if m.steered:
        shift = m.vignettes(
            "on-axis shift of the model that writes the texts",
            m.steered[:1],
            lambda p: float(m.on_axis(p)[0]),
            MOVES,
            unit=" nats",
        )
        figures.append(shift)
    else:
        figures.append(missing("on-axis shift of the steered model", "not measured yet"))
    thresholds = {"FALLS": FALLS, "RISES": RISES, "MOVES": MOVES}
    honest = "the record has no reading of the kept texts themselves" if m.steered else ""
    told = {"ladder": rungs}
    return answer(m, "Q0", "can we filter?", figures, thresholds, listed, honest, told=told)


def _falls(m: Measured, ladder: Sequence[Sequence[Event]]) -> Figure:
    foot, top = ladder[0], ladder[-1]
    value, low, high = difference(
        [not t["reasons"] for t in foot],
        [not t["reasons"] for t in top],
        paired=[t["prompt"] for t in foot] == [t["prompt"] for t in top],
        confidence=m.config.confidence,
    )
    return Figure("fall of survival from foot to top dose", value, low, high, FALLS, SHARES)


def _rises(m: Measured, probes: Sequence[Event]) -> Figure:
    pairs = np.array([[abs(t["dose"]), perplexity(t)] for t in probes])
    low, high = bootstrap(
        pairs, rank_correlation, resamples=m.config.bootstrap, confidence=m.config.confidence
    )
    what = "rank correlation of dose and base perplexity"
    return Figure(what, rank_correlation(pairs), low, high, RISES, TEXTS)


def _rung(dose: float, group: Sequence[Event]) -> dict[str, float | None]:
    middle = median(group)
    kept = sum(not t["reasons"] for t in group)
    return {"dose": dose, "kept": kept, "generated": len(group), "perplexity": middle}
