"""Where an answer turns from yes to no: every threshold of the study, each with its reason."""

COHERENT = 0.97
"""Q1, Q2: share of base's valid-answer mass, and of base's survival of free samples, that a
coherent student has: "within a whisker of base". Earlier work on a larger model held 0.997 over
eight rounds, so one that stays coherent has room to pass."""

COLLAPSED = 2 / 3
"""Everything that claims success: below this share of base's valid-answer mass or survival the
student has collapsed. Earlier work on a larger model had token loops where the mass was 0.62 of
base's; two thirds is the round number above it."""

KEEPS = 0.5
"""Q1: share of the steered on-axis shift that healing must keep. "Most of it" is more than half."""

FALLS = 0.1
"""Q0: how much lower survival must be at the top of the dose ladder than at its foot [share]. A
filter that drops less than one completion in ten more tells the dose walk nothing."""

RISES = 0.1
"""Q0: rank correlation of dose and base perplexity over the ladder. Below 0.1 an effect is less
than small (Cohen 1988). Ranks, because an empty completion has no finite perplexity."""

MOVES = 0.0
"""Q0, Q1, Q3: on-axis shift, its increments and their trend, nats, and the cosine of later vectors
to the first. Any step in the expected direction counts; its interval says whether it is one."""

MATCHED = 0.9
"""Prompting: share of the prompted persona's coherence that a healed stage needs to be compared
with it. A tenth, since survival is counted on a few samples and a closer match cannot be shown.
Mass above base's counts as base's: a persona that names the options raises them, which is no
greater coherence."""

SELECTIVE = 1.0
"""Selectivity: the on-axis shift over the largest off-axis shift. At 1 or below, something that
nobody asked for moved as far as what was asked for."""

CHANCE = 1 / 7
"""Reading: share of the vignettes whose foundation one of seven options names by chance."""
