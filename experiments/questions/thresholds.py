"""Thresholds between yes and no: every threshold of the study, each with its reason."""

import math

from experiments.questions.estimates import difference

COHERENT = 0.97
"""Q1, Q2: share of base's valid-answer mass that a coherent student keeps, nearly all of
it. Earlier work on a larger model held 0.997 over eight rounds. Survival of free samples may
fall by as much, or by what the number of samples resolves (`survival_margin`)."""

COLLAPSED = 2 / 3
"""Every claim of success: below this share of base's mass or survival the student has collapsed.
Earlier work on a larger model had token loops at 0.62 of base's mass; this is a little above."""

KEEPS = 0.5
"""Q1: share of the steered on-axis shift that the student must keep: more than half of it."""

FALLS = 0.1
"""Q0: fall of survival from the lower half of the doses to the highest [share]. A filter that drops
less than one completion in ten more gives the dose walk no signal."""

RISES = 0.1
"""Q0: rank correlation of dose and base perplexity over the ladder. Below 0.1 an effect is less
than small (Cohen 1988). Ranks, because an empty completion has no finite perplexity."""

MOVES = 0.0
"""Q0, Q1, Q3: on-axis shift, its increments and their trend, nats, and the cosine of later vectors
to the first. Any step in the expected direction counts; its interval decides whether it is one."""

MATCHED = 0.9
"""Prompting: share of the prompted persona's coherence that a healed stage needs to be compared
with it (survival: within `survival_margin`). Mass above base's counts as base's: a persona that
names the options raises them, which is no greater coherence."""

SELECTIVE = 1.0
"""Selectivity: the on-axis shift over the largest off-axis shift. At 1 or below, a foundation off
the axis moved as far as those on it."""

SEPARATES = 0.9
"""Validity of the conflicts, of a cloze: share of the items in which base follows the text before
it, in which the personas differ in the expected direction. One in ten may be badly written."""

CHANCE = 1 / 7
"""Readability: share of the vignettes whose foundation one of seven options names by chance."""


def survival_margin(share: float, kept: int, samples: int, confidence: float) -> float:
    """Drop in survival that a stage may have and still count as no worse [absolute share].

    A non-inferiority margin: yes if the interval of the difference to the reference lies above
    -margin, no if it lies below. A stage that survives exactly as often as its reference, on other
    prompts, must be able to meet it; so the margin is how far below 0 the interval of that
    difference (Newcombe 1998) reaches, rounded up to the next hundredth, and never less than 1 -
    `share`. Where the reference keeps all n samples that is z^2 / (n + z^2), z being the two-sided
    normal quantile. Whether a stage has collapsed is decided apart (`COLLAPSED`).

    Args:
        kept, samples: how many of the reference's samples survive, of how many.

    Example:
        >>> [survival_margin(0.97, n, n, 0.95) for n in (8, 16, 125)]
        [0.33, 0.2, 0.03]
        >>> survival_margin(0.97, 14, 16, 0.95)
        0.27
    """
    reference = [i < kept for i in range(samples)]
    equal = reference[::-1]
    _, low, _ = difference(equal, reference, paired=True, confidence=confidence)
    resolved = (math.floor(-100 * low) + 1) / 100
    return max(round(1 - share, 9), resolved)
