"""Thresholds between yes and no: every threshold of the study, each with its reason."""

COHERENT = 0.9
"""Q1, Q2: share of base's use of context (or of its valid-answer mass) of which a coherent student
has more; a non-inferiority margin, as `SURVIVAL_LOSS`. The 40 conflicts of a default stage have a
standard error of 0.03 to 0.045, by which a student exactly as good as base is a yes in 6 to 9 of 10
runs. For the 0.97 that earlier work held in valid-answer mass, on a larger model, that would take
some 350 conflicts."""

SURVIVAL_LOSS = 0.2
"""Q1, Q2, prompting: by how much the share of a stage's samples that pass the filter may be below
its reference's, for the stage to count as no less coherent [absolute share]; a non-inferiority
margin. One text in five is more than the 0.13 to which the default 64 samples of a stage and 128 of
base resolve the difference of two equal shares of 0.8, and where base has 0.8 it is less than the
fall of 0.27 that is a collapse (`COLLAPSED`)."""

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
with it (survival: within `SURVIVAL_LOSS`). Mass above base's counts as base's: a persona that
names the options raises them, which is no greater coherence."""

SELECTIVE = 1.0
"""Selectivity: the on-axis shift over the largest off-axis shift. At 1 or below, a foundation off
the axis moved as far as those on it."""

SEPARATES = 0.9
"""Validity of the conflicts, of a cloze: share of the items in which base follows the text before
it, in which the personas differ in the expected direction. One in ten may be badly written."""

CHANCE = 1 / 7
"""Readability: share of the vignettes whose foundation one of seven options names by chance."""
