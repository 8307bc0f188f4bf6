"""The arms on one page, from their records alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from markupsafe import Markup

from experiments.arms.catalogue import ARMS
from experiments.arms.compare import LEVELS, Found, spots
from experiments.arms.tables import columns, kinds_words, question, sentence, verdicts
from experiments.arms.text_kl import HOWS, KINDS, kinds_tau, sizes, summary
from experiments.record.journal import Line, read_lines, write
from experiments.record.reader import axis_of, read
from experiments.report.distributions import distribution
from experiments.report.page import MARKS, environment
from experiments.report.page_charts import Figure, drawn
from experiments.report.scales import AxisSpec
from experiments.report.svg import chart, styles
from experiments.report.svg_frame import Point, Rule, Series

_KIND_COLOURS = dict(zip(KINDS, ("blue", "green", "red"), strict=True))
LEAST = 0.01
"""Where the axes of the divergences begin [nats]."""


def write_page(folder: Path, found: Found, texts: Sequence[Line]) -> Path:
    """Write report.html into the folder of the arms.

    Raises:
        ShlError: a record in it was changed, or the page cannot be written.
    """
    runs = {
        name: {seed: folder / name / f"seed{seed}" for seed in by_seed}
        for name, by_seed in found.items()
        if name in ARMS
    }
    first = next(path for by_seed in runs.values() for path in by_seed.values())
    config, events, _ = read(first)
    told = [v | {"question": question(v), "sentence": sentence(v)} for v in verdicts(found)]
    table = columns(found)
    page = (
        environment()
        .get_template("arms.html")
        .render(
            model=config["model"],
            axis=axis_of(first),
            seeds=sorted({seed for by_seed in runs.values() for seed in by_seed}),
            doubts=[e for e in events if e["event"] == "validity"],
            strict=[v for v in told if v["level"] == LEVELS[0]],
            verdicts=told,
            marks=MARKS,
            planes=planes(found),
            columns=list(dict.fromkeys(key for row in table for key in row)),
            table=table,
            kinds=kinds(texts, kinds_tau(folder)) if texts else [],
            words=kinds_words(summary(texts)) if texts else [],
            arms=[
                {
                    "name": arm.name,
                    "asks": arm.asks,
                    "seeds": sorted(runs.get(arm.name, {})),
                    "ended": {s: _ended(path) for s, path in runs.get(arm.name, {}).items()},
                }
                for arm in ARMS.values()
            ],
        )
    )
    write(folder / "report.html", page)
    return folder / "report.html"


def _ended(path: Path) -> str:
    last = read_lines(path / "events.jsonl")[-1]
    return {"end": "", "starved": "starved"}.get(last["event"], "unfinished")


def planes(found: Found) -> list[Figure]:
    """Trait shift against each coherence, one curve per arm."""
    looks = dict(zip(found, styles(len(found)), strict=True))

    def plane(key: str, label: str, log: bool) -> Markup:
        series = []
        for arm, by_seed in found.items():
            paths = [path for path in by_seed.values() if path]
            if not paths:
                continue
            colour, marker, dash = looks[arm]
            start = [] if arm == "persona" else [Point(1.0, 0.0)]
            points = [
                Point(s.x, s.trait, s.x_interval, s.interval, s.label) for s in spots(paths, key)
            ]
            kind: Literal["points", "line"] = "points" if arm == "persona" else "line"
            series.append(Series(arm, [*start, *points], colour, marker, kind, dash))
        return chart(
            series,
            AxisSpec(label, log=log),
            AxisSpec("on-axis trait shift [nats]"),
            title=f"trait shift against {label}",
            desc="One curve per arm from base (1, 0), points labelled by round or dose.",
            rules=[
                Rule("base", 0.0),
                Rule(f"{LEVELS[0]:g} of base", LEVELS[0], along="x", colour="ink", dash="1 5"),
            ],
            direct=True,
            width=470,
            height=380,
        )

    caption = (
        "every curve starts at base (1, 0); points are labelled by round, those of `steered` by "
        "dose. Up and to the right is better. Whiskers: least and greatest seed; with one seed, "
        "the trait's 95 % interval over vignettes."
    )
    return [
        drawn(f"Valid-answer mass: {caption}", lambda: plane("mass", "mass / base", True)),
        drawn(
            f"Free samples that pass the filter: {caption}",
            lambda: plane("survival", "survival / base", False),
        ),
    ]


def kinds(texts: Sequence[Line], tau: float) -> list[Figure]:
    """How each aggregate of the per-token KL is spread over the texts of each kind."""

    def one(how: str) -> Figure:
        groups = {kind: sizes(texts, kind, how) for kind in KINDS}
        named = {k: v for k, v in groups.items() if v}
        return drawn(
            f"{how} of a text's per-token KL: share of the texts at or below it.",
            lambda: distribution(
                {f"{kind} ({len(values)} texts)": values for kind, values in named.items()},
                AxisSpec(f"{how} of per-token KL [nats]", log=True, low=LEAST),
                title=f"distribution of {how}",
                desc="Share of texts at or below a divergence, by kind, with tau.",
                rules=[Rule(f"tau {tau:g}", tau, along="x", colour="ink")] if tau > 0 else [],
                low=LEAST,
                colours=[_KIND_COLOURS[kind] for kind in named],
                share="share of texts at or below",
            ),
        )

    return [one(how) for how in HOWS]
