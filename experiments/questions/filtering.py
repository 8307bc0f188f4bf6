"""Q0: does the filter detect what the dose breaks, and does the kept text carry the trait?"""

from collections.abc import Sequence

import numpy as np

from experiments.questions.estimates import SHARES, Estimate, number, spearman
from experiments.questions.measurements import (
    TIMES,
    Finding,
    Measurements,
    median_perplexity,
    missing,
    perplexity,
    question,
)
from experiments.questions.thresholds import FALLS, MOVES, RISES
from experiments.record.reader import Event
from shl.measure.stats import bootstrap


@question("Q0", "can we filter?", "FALLS", "RISES", "MOVES", healed=False)
def filters(m: Measurements) -> Finding:
    """Q0: do survival fall and perplexity rise with the dose, and does the steered model, which
    writes the texts, move along the axis? The kept texts themselves are not measured."""
    steered = [t for t in m.texts if t["stage"] in ("probe", "batch") and t["round"] == 0]
    doses = sorted({t["dose"] for t in steered}, key=abs)
    estimates, rungs, listed = [], [], ""
    if len(doses) < 2:
        why = "no doses were probed, the walk was off or has not begun"
        estimates.append(missing("trend over the dose ladder", why))
    else:
        ladder = [[t for t in steered if t["dose"] == dose] for dose in doses]
        # Pooled, because a single rung has few texts.
        lower = [t for t in steered if abs(t["dose"]) <= max(abs(doses[-1]) / 2, abs(doses[0]))]
        fall = m.survival_difference(lower, ladder[-1])
        what = "fall of survival from doses up to half the highest, to the highest"
        estimates += [Estimate(what, fall, FALLS, SHARES), _rises(m, steered)]
        rungs = [
            {
                "dose": dose,
                "kept": sum(not t["reasons"] for t in group),
                "generated": len(group),
                "perplexity": median_perplexity(group),
            }
            for dose, group in zip(doses, ladder, strict=True)
        ]
        listed = "kept and median base perplexity by dose: " + ", ".join(
            f"{r['dose']:.2f} {r['kept']}/{r['generated']} {number(r['perplexity'])}" for r in rungs
        )
    what = "on-axis shift of the steered model"
    if m.steered:
        estimates.append(m.shift(what, m.steered[:1], lambda s: s[0], MOVES))
    else:
        estimates.append(missing(what, "not measured yet"))
    return Finding(estimates, [listed], {"ladder": rungs})


def _rises(m: Measurements, steered: Sequence[Event]) -> Estimate:
    pairs = np.array([[abs(t["dose"]), perplexity(t)] for t in steered])

    def correlation(rows: np.ndarray) -> float:
        return spearman(rows[:, 0], rows[:, 1])

    resamples, confidence = TIMES * m.config.bootstrap, m.config.confidence
    interval = bootstrap(pairs, correlation, resamples=resamples, confidence=confidence)
    what = "rank correlation of dose and base perplexity"
    return Estimate(what, (correlation(pairs), *interval), RISES, "bootstrap over texts")
