"""Q1 to Q3: what healing leaves, over the rounds."""

from dataclasses import replace

import numpy as np

from experiments.questions.estimates import EXACT, Answer, Figure, all_of, number
from experiments.questions.measurements import (
    NO_ROUND,
    Measured,
    Profiles,
    answer,
    mass_of,
    median,
    missing,
    too_few,
)
from experiments.questions.thresholds import COHERENT, COLLAPSED, KEEPS, MOVES
from experiments.record.reader import Event, of_round


def heals(m: Measured) -> Answer:
    """Q1: is the healed student coherent where the steered one was not, with most of its shift?

    Decided in round 0, where both start from base; every round is told.
    """
    thresholds = {"COHERENT": COHERENT, "KEEPS": KEEPS, "MOVES": MOVES}
    question = "does healing heal?"
    if not (m.healed and m.steered):
        return answer(m, "Q1", question, [missing("healed stage", NO_ROUND)], thresholds)
    steered, healed = m.steered[0], m.healed[0]
    figures = [
        _broken(m, steered),
        *(replace(f, what=f"healed {f.what}") for f in m.coherence(healed)),
        m.vignettes(
            "steered on-axis shift",
            [steered],
            lambda p: float(m.on_axis(p)[0]),
            MOVES,
            unit=" nats",
        ),
        m.vignettes(
            f"healed on-axis shift less {KEEPS:g} x steered",
            [steered, healed],
            lambda p: float(m.on_axis(p) @ (-KEEPS, 1.0)),
            0.0,
            unit=" nats",
        ),
    ]
    kept = [_kept(m, s, h) for s, h in zip(m.steered, m.healed, strict=False)]
    listed = ", ".join(
        f"round {k.round}: "
        + (
            f"{k.value:.0%} ({k.low:.0%} to {k.high:.0%})"
            if None not in (k.value, k.low, k.high)
            else k.note
        )
        for k in kept
    )
    more = f"share of the steered shift kept {listed}"
    told = {"kept": [k.told() for k in kept]}
    return answer(m, "Q1", question, figures, thresholds, too_few(m, figures), more, told=told)


def _broken(m: Measured, steered: Event) -> Figure:
    """That the steered stage is less than coherent: without it there is nothing to heal."""
    mass, survival = (
        m.vignettes(
            f"steered valid-answer mass, short of {COHERENT:g} x base's",
            [steered],
            lambda p: COHERENT - mass_of(p),
            0.0,
            trait=False,
        ),
        m.survival("", steered, m.base, COHERENT),
    )
    if survival.value is not None and survival.low is not None and survival.high is not None:
        survival = replace(
            survival,
            what=f"steered survival, short of {COHERENT:g} x base's",
            value=-survival.value,
            low=-survival.high,
            high=-survival.low,
        )
    shown = survival if survival.verdict == "yes" and mass.verdict != "yes" else mass
    return replace(shown, soft=True)


def _kept(m: Measured, steered: Event, healed: Event) -> Figure:
    """Share of the steered shift that healing keeps, where there surely is one to keep."""
    index = healed["round"]
    before = m.vignettes("", [steered], lambda p: float(m.on_axis(p)[0]), MOVES)
    if before.low is None or before.low <= 0:
        note = "unknown, the steered stage has no sure shift"
        return replace(before, what="share kept", value=None, low=None, high=None, note=note)

    def share(p: Profiles) -> float:
        s, h = m.on_axis(p)
        # Few resamples may lose a shift whose interval excludes zero.
        return float(h / s) if s > 0 else 0.0

    return m.vignettes("share kept", [steered, healed], share, KEEPS, index=index)


def coherent(m: Measured) -> Answer:
    """Q2: does every healed student stay within a whisker of base?"""
    thresholds = {"COHERENT": COHERENT, "COLLAPSED": COLLAPSED}
    question = "coherent over the loop?"
    if not m.healed:
        return answer(m, "Q2", question, [missing("healed stage", NO_ROUND)], thresholds)
    pairs = [m.coherence(h, COHERENT, h["round"]) for h in m.healed]
    figures = [mass for mass, _ in pairs] + [survival for _, survival in pairs]
    state = all_of(f.verdict for f in m.intact)
    collapse = {
        "no": f"it has collapsed (below {number(COLLAPSED)} of base)",
        "undecided": f"collapse (below {number(COLLAPSED)} of base) is not ruled out",
    }.get(state, "")
    medians = [median(m.samples(stage)) for stage in (m.base, *m.healed)]
    more = "median base perplexity of the samples " + ", ".join(map(number, medians[1:]))
    more += f", of base's own {number(medians[0])}"
    told = {
        "collapsed": {"no": "yes", "yes": "no"}.get(state, state),
        "collapse": [f.told() for f in m.intact],
        "perplexity": {"base": medians[0], "healed": medians[1:]},
    }
    return answer(
        m, "Q2", question, figures, thresholds, collapse, too_few(m, figures), more, told=told
    )


def direction(m: Measured) -> Answer:
    """Q3: does the on-axis shift grow round by round, along one direction?"""
    question, thresholds = "one direction?", {"MOVES": MOVES, "COLLAPSED": COLLAPSED}
    if not m.healed:
        return answer(m, "Q3", question, [missing("healed stage", NO_ROUND)], thresholds)
    figures = []
    for k, h in enumerate(m.healed):
        before = m.healed[k - 1 : k]
        figures.append(
            m.vignettes(
                "on-axis shift gained",
                [*before, h],
                lambda p: float(np.diff([0.0, *m.on_axis(p)])[-1]),
                MOVES,
                index=h["round"],
                unit=" nats",
            )
        )
    if len(m.healed) > 1:
        places = np.arange(len(m.healed) + 1.0)
        weights = (places - places.mean()) / ((places - places.mean()) ** 2).sum()
        figures.append(
            m.vignettes(
                "trend",
                m.healed,
                lambda p: float(weights @ [0.0, *m.on_axis(p)]),
                MOVES,
                unit=" nats per round",
            )
        )
    figures += _cosines(m)
    shifts = m.on_axis(m.profiles(m.healed)).tolist()
    more = "on-axis shift per round " + ", ".join(map(number, shifts)) + " nats"
    return answer(
        m, "Q3", question, [*figures, *m.intact], thresholds, more, told={"shifts": shifts}
    )


def _cosines(m: Measured) -> list[Figure]:
    """Later vectors against the first: the range over layers is no error, but all must agree."""
    what = "cosine of the vector to the first"
    later = [e for e in of_round(m.events, "round") if e["round"] > 0]
    if not later:
        return [missing(what, "there is no second round")]
    found = []
    for e in later:
        values = list(e["cosine_to_first"].values())
        mean = sum(values) / len(values)
        note = f"{number(min(values))} to {number(max(values))} over layers"
        found.append(Figure(what, mean, min(values), max(values), MOVES, EXACT, e["round"], note))
    return found
