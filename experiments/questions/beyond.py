"""Is the shift more than prompting gives, is it selective, and can it be read at all?"""

from collections.abc import Sequence

import numpy as np

from experiments.questions.estimates import WILSON, Answer, Figure, all_of, any_of, number, wilson
from experiments.questions.measurements import (
    NO_ROUND,
    Measured,
    Profiles,
    answer,
    mass_of,
    missing,
)
from experiments.questions.thresholds import CHANCE, COLLAPSED, MATCHED, SELECTIVE
from shl.config import FOUNDATIONS


def prompting(m: Measured) -> Answer:
    """Does a healed round that is as coherent as the prompted persona have more of the shift?

    A persona raises the options that it names whichever way it leans, so half the contrast of the
    two personas is a rival too; within each resample the larger of both counts, and never less
    than no shift. Any round may win, so its interval is widened by Bonferroni.
    """
    key, question = "prompting", "beyond prompting?"
    thresholds = {"MATCHED": MATCHED, "COLLAPSED": COLLAPSED}
    plus, minus = m.first("prompted+"), m.first("prompted-")
    if not m.healed or plus is None or minus is None:
        return answer(m, key, question, [missing("healed stage", NO_ROUND)], thresholds)

    def lead(p: Profiles) -> float:
        positive, negative, reached = m.on_axis(p)
        return float(reached - max(0.0, positive, (positive - negative) / 2))

    groups: list[list[Figure]] = []
    for h in m.healed:
        index = h["round"]
        groups.append(
            [
                m.vignettes(
                    "valid-answer mass over the prompted persona's or base's, the smaller",
                    [plus, h],
                    lambda p: mass_of(p, 2) / min(1.0, mass_of(p, 1)),
                    MATCHED,
                    index=index,
                    trait=False,
                ),
                m.survival(
                    f"survival less {MATCHED:g} x the prompted persona's", h, plus, MATCHED, index
                ),
                m.vignettes(
                    "on-axis shift less prompting's",
                    [plus, minus, h],
                    lead,
                    0.0,
                    index=index,
                    among=len(m.healed),
                    unit=" nats",
                ),
            ]
        )
    each = [all_of(f.verdict for f in group) for group in groups]
    verdict = all_of([any_of(each), *(f.verdict for f in m.intact)])
    positive, negative, *reached = m.on_axis(m.profiles([plus, minus, *m.healed])).tolist()
    half = (positive - negative) / 2
    winners = [str(h["round"]) for h, v in zip(m.healed, each, strict=True) if v == "yes"]
    matched = [all_of(f.verdict for f in group[:2]) for group in groups]
    said = (
        f"on-axis shift of the prompted persona {number(positive)}, half its contrast to the "
        f"opposite {number(half)}, healed {', '.join(map(number, reached))} nats",
        f"ahead in round {', '.join(winners)}" if winners else "",
        "no healed round is as coherent as the prompted persona"
        if all(v == "no" for v in matched)
        else "",
    )
    figures = [f for column in zip(*groups, strict=True) for f in column]
    told = {"prompted": positive, "half_contrast": half, "healed": reached, "rounds": each}
    figures += m.intact
    return answer(m, key, question, figures, thresholds, *said, told=told, verdict=verdict)


def selective(m: Measured) -> Answer:
    """Is the last healed stage's shift on the axis larger than the largest one off it?"""
    key, question = "selective", "on the axis?"
    thresholds = {"SELECTIVE": SELECTIVE, "COLLAPSED": COLLAPSED}
    if not m.healed:
        return answer(m, key, question, [missing("healed stage", NO_ROUND)], thresholds)
    last = m.healed[-1]
    shift = m.reading(last).shift(m.reading(m.base))
    on = m.on_axis(m.profiles([last])).item()
    listed = ", ".join(f"{name} {number(shift[name])}" for name in m.axis.expected)
    others = [name for name in FOUNDATIONS if name not in m.axis.expected]
    if not others:
        text = f"Not asked: the axis expects every foundation to move. Shifts: {listed} nats."
        return Answer(key, question, "told", text, {"shift": shift, "on": on}, thresholds)
    worst = max(others, key=lambda name: abs(shift[name]))
    figure = m.vignettes(
        f"on-axis shift less {SELECTIVE:g} x the largest off-axis",
        [last],
        lambda p: float(m.on_axis(p)[0] - SELECTIVE * m.off_axis(p)[0]),
        0.0,
        index=last["round"],
        unit=" nats",
    )
    off = abs(shift[worst])
    more = (
        f"{listed}, largest off-axis {worst} {number(shift[worst])} nats, ratio "
        f"{number(on / off if off > 0 else None)}"
    )
    told = {"shift": shift, "on": on, "off": off, "foundation": worst}
    return answer(m, key, question, [figure, *m.intact], thresholds, more, told=told)


def readable(m: Measured) -> Answer:
    """Does the probe name the vignettes' foundations on base, those of the axis among them?"""
    key, question, thresholds = "readable", "can we read it?", {"CHANCE": CHANCE}
    if m.first("base") is None:
        return answer(m, key, question, [missing("base", "base was not measured")], thresholds)
    base = m.reading(m.base)
    figures = [m.accuracy, *_own(m, base.confusion)]
    verdict = all_of(f.verdict for f in figures)
    if m.invalid:
        verdict = "no"
    noise = base.noise
    said = f"chance {number(CHANCE)}, readings that are noise (at most twice chance): " + (
        f"{', '.join(noise)}, do not read these" if noise else "none"
    )
    told = {"noise": list(noise), "invalid": m.invalid}
    return answer(
        m, key, question, figures, thresholds, said, m.invalid, told=told, verdict=verdict
    )


def _own(m: Measured, confusion: np.ndarray) -> Sequence[Figure]:
    """Each foundation of the axis in its own few vignettes."""
    found = []
    for name in m.axis.expected:
        row = confusion[FOUNDATIONS.index(name)]
        hits, total = int(row[FOUNDATIONS.index(name)]), int(row.sum())
        what = f"of those of {name}"
        if not total:
            found.append(missing(what, "there are none"))
            continue
        low, high = wilson(hits, total, m.config.confidence)
        found.append(Figure(what, hits / total, low, high, CHANCE, WILSON))
    return found
