"""Q1 to Q3: coherence and shift of the healed students, over the rounds."""

from dataclasses import replace
from typing import Any

import numpy as np

from experiments.questions.estimates import EXACT, Estimate, all_of, number
from experiments.questions.measurements import (
    Finding,
    Measurements,
    median_perplexity,
    missing,
    question,
)
from experiments.questions.thresholds import COHERENT, COLLAPSED, KEEPS, MOVES
from experiments.record.reader import Event, of_round


@question("Q1", "does the student keep the shift?", "COHERENT", "SURVIVAL_LOSS", "KEEPS", "MOVES")
def heals(m: Measurements) -> Finding:
    """Q1: is the healed student as coherent as base, with most of the steered shift?

    Decided in round 0, where both start from base; the share kept is given for every round. Whether
    there was anything to heal is said beside: at a dose that survives the filter the steered stage
    may be as coherent as base.
    """
    if not m.steered:
        return Finding([missing("steered stage")])
    steered, healed = m.steered[0], m.healed[0]
    kept = f"healed on-axis shift less {KEEPS:g} x steered"
    estimates = [
        *(replace(e, what=f"healed {e.what}") for e in m.coherence(healed)),
        m.shift(kept, [steered, healed], lambda s: s[1] - KEEPS * s[0]),
        m.shift("steered on-axis shift", [steered], lambda s: s[0], MOVES),
    ]
    broken = _broken(m, steered)
    said = "less coherent than base"
    said = said if broken.outcome == "yes" else f"not shown to be {said}"
    shares = [_kept(m, s, h) for s, h in zip(m.steered, m.healed, strict=False)]
    listed = ", ".join(
        f"round {e.round} "
        + ("{:.0%} ({:.0%} to {:.0%})".format(*e.limits) if e.limits else e.note)
        for e in shares
    )
    notes = [
        f"share of the steered shift kept: {listed}",
        f"the steered stage is {said}: {broken}",
    ]
    figures = {"kept": [e.as_json() for e in shares], "broken": broken.as_json()}
    return Finding(estimates, notes, figures)


def _broken(m: Measurements, steered: Event) -> Estimate:
    """That the steered stage is less coherent than base, without which there is nothing to heal."""
    what = f"steered COHERENCE short of {COHERENT:g} x base's"
    mass = m.ratio(what, [steered], 0.0, lambda r: COHERENT - float(r[0]))
    e = m.survival("steered survival short of base's", steered, m.base)
    if e.limits:
        value, low, high = e.limits
        e = replace(e, limits=(-value, -high, -low), threshold=-e.threshold)
    return replace(e if mass.outcome != "yes" == e.outcome else mass, soft=True)


def _kept(m: Measurements, steered: Event, healed: Event) -> Estimate:
    """Share of the steered shift that healing keeps, where the steered stage has a shift."""
    more: dict[str, Any] = {"round": healed["round"], "unit": ""}
    before = m.shift("share kept", [steered], lambda s: s[0], MOVES, **more)
    if before.limits is None or before.limits[1] <= 0:
        note = "unknown, the interval of the steered shift includes 0"
        return replace(before, limits=None, note=note)
    # Few resamples may lose a shift whose interval excludes zero.
    both = [steered, healed]
    return m.shift("share kept", both, lambda s: s[1] / s[0] if s[0] > 0 else 0.0, KEEPS, **more)


@question("Q2", "coherent over the loop?", "COHERENT", "SURVIVAL_LOSS", "COLLAPSED")
def coherent(m: Measurements) -> Finding:
    """Q2: is every healed student as coherent as base?"""
    mass, survival = zip(*(m.coherence(h, round=h["round"]) for h in m.healed), strict=True)
    intact = all_of(e.outcome for e in m.intact)
    base, *healed = [median_perplexity(m.samples(stage)) for stage in (m.base, *m.healed)]
    below = f"(below {number(COLLAPSED)} of base's)"
    collapse = {"no": f"collapsed {below}", "undecided": f"collapse {below} is not ruled out"}
    listed = ", ".join(map(number, healed))
    notes = [
        collapse.get(intact, ""),
        f"median base perplexity of samples: base {number(base)}, healed {listed}",
    ]
    figures = {
        "collapsed": {"no": "yes", "yes": "no"}.get(intact, intact),
        "collapse": [e.as_json() for e in m.intact],
        "perplexity": {"base": base, "healed": healed},
    }
    return Finding([*mass, *survival, *m.intact], notes, figures)


@question("Q3", "one direction?", "MOVES", "COLLAPSED")
def direction(m: Measurements) -> Finding:
    """Q3: does the on-axis shift grow round by round, along one direction?"""
    estimates, what = [], "on-axis shift gained"
    for k, h in enumerate(m.healed):
        pair, index = m.healed[max(0, k - 1) : k + 1], h["round"]
        gained = m.shift(what, pair, lambda s: np.diff([0.0, *s])[-1], MOVES, round=index)
        estimates.append(gained)
    if len(m.healed) > 1:
        x = np.arange(len(m.healed) + 1.0)
        slope = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
        what, unit = "trend of the on-axis shift", " nats per round"
        estimates.append(m.shift(what, m.healed, lambda s: slope @ [0, *s], MOVES, unit=unit))
    what = "cosine of the vector to the first"
    later = [e for e in of_round(m.events, "round") if e["round"] > 0]
    for e in later:
        # The range over layers is no sampling error, but all layers must agree.
        cosines = list(e["cosine_to_first"].values())
        limits = (sum(cosines) / len(cosines), min(cosines), max(cosines))
        note = f"{number(limits[1])} to {number(limits[2])} over layers"
        estimates.append(Estimate(what, limits, MOVES, EXACT, e["round"], note))
    if not later:
        estimates.append(missing(what, "there is no second round"))
    shifts = m.shifts(m.healed)
    note = f"on-axis shift per round: {', '.join(map(number, shifts))} nats"
    return Finding([*estimates, *m.intact], [note], {"shifts": shifts})
