"""Is the shift more than prompting gives, is it selective, and is the instrument readable?"""

from dataclasses import replace

import numpy as np

from experiments.questions.estimates import Estimate, Outcome, all_of, number
from experiments.questions.measurements import (
    Finding,
    Measurements,
    missing,
    question,
)
from experiments.questions.thresholds import CHANCE, MATCHED, SELECTIVE, SEPARATES
from shl.config import FOUNDATIONS


@question("prompting", "beyond prompting?", "MATCHED", "SURVIVAL_LOSS", "COLLAPSED")
def prompting(m: Measurements) -> Finding:
    """Does a healed round that is as coherent as the prompted persona have more of the shift?

    A persona raises the options that it names whichever way it leans, so half the contrast of the
    two personas is a rival too; within each resample the larger of both counts, and never less
    than no shift. Any round may win, so its interval is widened by Bonferroni.
    """
    plus, minus = m.first("prompted+"), m.first("prompted-")
    if plus is None or minus is None:
        return Finding([missing("prompted stages")])

    def lead(s: np.ndarray) -> float:
        return float(s[2] - max(0.0, s[0], (s[0] - s[1]) / 2))

    def matched(r: np.ndarray) -> float:
        return float(r[1] / min(1.0, r[0]))

    groups: list[list[Estimate]] = []
    shift, count = "on-axis shift less prompting's", len(m.healed)
    mass = "COHERENCE over the prompted persona's or base's, the smaller"
    survival = "survival less the prompted persona's"
    for h in m.healed:
        group = [
            m.shift(shift, [plus, minus, h], lead, comparisons=count),
            m.ratio(mass, [plus, h], MATCHED, matched),
            m.survival(survival, h, plus),
        ]
        groups.append([replace(e, round=h["round"]) for e in group])
    each = [all_of(e.outcome for e in group) for group in groups]
    best: Outcome = "yes" if "yes" in each else "no" if set(each) == {"no"} else "undecided"
    verdict = all_of([best, *(e.outcome for e in m.intact)])
    positive, negative, *reached = m.shifts([plus, minus, *m.healed])
    half = (positive - negative) / 2
    winners = [str(h["round"]) for h, v in zip(m.healed, each, strict=True) if v == "yes"]
    unmatched = all(all_of(e.outcome for e in group[1:]) == "no" for group in groups)
    notes = [
        f"ahead in round {', '.join(winners)}" if winners else "",
        "no healed round is as coherent as the prompted persona" if unmatched else "",
        f"on-axis shift: prompted {number(positive)}, half the personas' contrast {number(half)}, "
        f"healed {', '.join(map(number, reached))} nats",
    ]
    # The rounds that decide come first.
    groups.sort(key=lambda group: all_of(e.outcome for e in group) != verdict)
    estimates = [*(e for group in zip(*groups, strict=True) for e in group), *m.intact]
    figures = {"prompted": positive, "half_contrast": half, "healed": reached, "rounds": each}
    return Finding(estimates, notes, figures, verdict)


@question("selective", "on the axis?", "SELECTIVE", "COLLAPSED")
def selective(m: Measurements) -> Finding:
    """Is the last healed stage's shift on the axis larger than the largest one off it?"""
    if m.by_cloze:
        return Finding(
            [], ["not applicable: a cloze reads the trait, no other foundation"], {}, "info"
        )
    last = m.healed[-1]
    shift = m.evaluation(last).shift(m.evaluation(m.base))
    (on,) = m.shifts([last])
    listed = ", ".join(f"{name} {number(shift[name])}" for name in m.axis.expected)
    others = [name for name in FOUNDATIONS if name not in m.axis.expected]
    if not others:
        note = f"not applicable: the axis expects every foundation to move, {listed} nats"
        return Finding([], [note], {"shift": shift, "on": on}, "info")
    worst = max(others, key=lambda name: abs(shift[name]))
    what = f"on-axis shift less {SELECTIVE:g} x the largest off-axis"
    margin = m.shift(
        what, [last], lambda s: float(s[0] - SELECTIVE * s[1]), off=True, round=last["round"]
    )
    note = f"{listed}, largest off-axis {worst} {number(shift[worst])} nats"
    figures = {"shift": shift, "on": on, "off": abs(shift[worst]), "foundation": worst}
    return Finding([margin, *m.intact], [note], figures)


@question("readable", "can we read it?", "CHANCE", "SEPARATES", healed=False)
def readable(m: Measurements) -> Finding:
    """Is the axis's cloze valid on this model, or else: does base choose the vignettes' foundations
    above chance, those of the axis among them?"""
    if m.first("base") is None:
        return Finding([missing("base", "base was not measured")])
    context = f"coherence is read by {'the use of context' if m.uses_context else 'the vignettes'}"
    if m.reads_cloze:
        note = (
            f"the personas differ as expected in at least {SEPARATES:.0%} of the cloze's openings"
        )
        return Finding([], [note, context], {"context": m.uses_context}, "yes")
    if not m.axis.expected:
        minus = m.first("prompted-")
        if minus is None or m.read("cloze", [minus]) is None:
            return Finding([missing("cloze of the personas", "not read yet")], [context])
        return Finding([], [m.doubt, context], {"context": m.uses_context}, "no")
    base = m.evaluation(m.base)
    estimates = [m.accuracy]
    for name in m.axis.expected:
        row, what = base.confusion[FOUNDATIONS.index(name)], f"share of {name} vignettes"
        hits, total = int(row[FOUNDATIONS.index(name)]), int(row.sum())
        estimates.append(
            m.share(what, hits, total, CHANCE) if total else missing(what, "there are none")
        )
    noise = ", ".join(base.noise)
    note = f"not readable (at most twice chance): {noise}" if noise else ""
    figures = {"noise": list(base.noise), "invalid": m.invalid}
    return Finding(estimates, [note, m.invalid, context], figures, "no" if m.invalid else None)
