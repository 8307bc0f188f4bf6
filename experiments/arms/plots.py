"""Charts of the arms: trait against coherence, and per-token KL of the groups of text."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from experiments.arms.compare import LEVELS, Found, seed_means
from experiments.arms.text_kl import GROUPS, HOWS, sizes
from experiments.record.journal import Line
from experiments.report import figures as fig
from shl.utils.errors import require

NAMES = {"context": "use of context (or valid-answer mass) / base", "survival": "survival / base"}
LEAST = 0.01
"""Where the axes of the divergences begin [nats]."""


@fig.styled
def plane(found: Found) -> Figure:
    """On-axis trait shift against the use of context and survival, one line per arm from base.

    Points are labelled by round or dose, and are means over seeds with their range; with one seed
    the trait has its interval over items.
    """
    figure, panels = fig.grid(2, 2, (5.4, 4.4), sharey=True)
    for panel, key in zip(panels, ("context", "survival"), strict=True):
        panel.set(title="on-axis trait shift from base [nats]", xlabel=NAMES[key])
        panel.grid(axis="x")
        drawn = {
            arm: (look, seed_means(paths, key))
            for (arm, by_seed), look in zip(found.items(), fig.looks(len(found)), strict=True)
            if (paths := [path for path in by_seed.values() if path])
        }
        require(bool(drawn), "no arm has a point on the plane.")
        if key == "context":
            fig.log_axis(
                panel, "x", [1.0, *(point.x for _, points in drawn.values() for point in points)]
            )
        for arm, (look, points) in drawn.items():
            # The persona's two points are readings of one model; any other arm is a path from base.
            start = [] if arm == "persona" else [1.0]
            spans = [point.x_interval for point in points if point.x_interval is not None]
            fig.series(
                panel,
                [*start, *(point.x for point in points)],
                [*(0.0 for _ in start), *(point.trait for point in points)],
                (look[0], look[1], "none" if arm == "persona" else look[2]),
                arm,
                x_spans=[*((1.0, 1.0) for _ in start if spans), *spans],
                y_spans=[*((0.0, 0.0) for _ in start), *(point.interval for point in points)],
            )
            for point in points:
                fig.point_label(panel, point.label, (point.x, point.trait), look, fontsize=7.5)
        fig.rule(panel, 0.0, ("grey", "", "--"), "base")
        fig.rule(panel, LEVELS[0], ("text", "", ":"), f"{LEVELS[0]:g} of base", along="x")
    fig.layout(figure, 8)
    return figure


@fig.styled
def text_kl(lines: Sequence[Line], tau: float) -> Figure:
    """Distribution over texts of each aggregate of the per-token KL, by group, with tau."""
    groups: dict[str, fig.Look] = {
        group: (colour, "", dash)
        for group, colour, dash in zip(
            GROUPS, ("blue", "green", "red"), ("-", "--", "-."), strict=True
        )
    }
    figure, panels = fig.grid(len(HOWS), 2, sharey=True)
    for panel, how in zip(panels, HOWS, strict=True):
        panel.set(title="share of texts at or below", xlabel=f"{how} of per-token KL [nats]")
        values = {group: sizes(lines, group, how) for group in groups}
        fig.ecdf(
            panel,
            {f"{k} ({len(v)} texts)": (groups[k], v) for k, v in values.items() if v},
            LEAST,
            tau,
        )
    fig.layout(figure)
    return figure


def charts(found: Found, texts: Sequence[Line], tau: float | None) -> dict[str, fig.Chart]:
    """By name, the charts of the arms; `tau` is None where no text has been measured."""
    every = {
        "arms": fig.chart(
            "arms",
            "Every line starts at base (1, 0); points are labelled by round, those of `steered` by "
            "dose. Up and to the right is better. Bars: least and greatest seed; with one seed, "
            "the trait's bootstrap interval over items. Left: use of context, or where that cannot "
            "be read the probability on valid answers; right: share of free samples that pass the "
            "filter.",
            lambda: plane(found),
        )
    }
    if tau is not None:
        every["text_kl"] = fig.chart(
            "text_kl",
            "Share of the texts of each group at or below a value of each aggregate of a text's "
            "per-token KL to base, with tau.",
            lambda: text_kl(texts, tau),
        )
    return every
