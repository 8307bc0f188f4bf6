"""Charts of a run, one matplotlib figure each; its record holds all their numbers."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.questions.estimates import wilson
from experiments.questions.measurements import Measurements
from experiments.questions.thresholds import COHERENT, SURVIVAL_LOSS
from experiments.record.reader import Event, items_of, of_round, stages
from experiments.report import figures as fig
from experiments.report.escape import clean
from experiments.report.tables import ladders
from shl.analysis.plots import FONT, drawable
from shl.config import FOUNDATIONS, EvalConfig
from shl.hooks.vector import SteeringVector
from shl.method.axes import Axis
from shl.utils.errors import require

LEAST_KL = 1e-3
"""Where the axis of token divergences begins [nats]."""

LOOKS: dict[str, fig.Look] = {
    "base": ("grey", "o", "--"),
    "steered": ("red", "o", "-"),
    "healed": ("green", "s", "-"),
    "prompted+": ("blue", "^", ":"),
    "prompted-": ("purple", "v", "-."),
}
RANDOM: fig.Look = ("grey", "_", "")
RANDOM_LABEL = "random vectors of the same KL"
VERDICTS: dict[str, fig.Look] = {
    "kept": ("blue", "", "-"),
    "dropped": ("red", "", "--"),
    "healed": ("green", "", ":"),
}
STEP_CHARTS: dict[str, dict[str, tuple[str, fig.Look]]] = {
    "D [nats]": {"d": ("D", ("green", "", "-"))},
    "lambda": {"lam": ("lambda", ("purple", "", "-"))},
    "share above tau": {
        "fired": ("completions, D > tau", ("orange", "", "-")),
        "tokens_over": ("tokens, KL > tau", ("teal", "", "--")),
    },
    "gradient norm at the final hidden states": {
        "grad_nll": ("NLL", ("blue", "", "-")),
        "grad_barrier": ("lambda x barrier", ("red", "", "--")),
    },
    "adapter's gradient norm before clipping": {"grad_adapter": ("A and B", ("grey", "", "-"))},
}
"""Panels of `barrier`: title, and the keys of a training step that are drawn with their labels."""
CAPTIONS = {
    "trajectory": "Shift from base of the axis's cloze, or of its foundations where no cloze is "
    "valid on this model, {level} intervals paired by item; coherence over base's; survival, the "
    "share of free samples that pass the filter, {level} Wilson intervals. In each healed stage Q2 "
    f"needs {COHERENT:g} of base's coherence, and survival at most {SURVIVAL_LOSS:g} below base's.",
    "plane": "Care against authority, log of their mean probability over the vignettes; numbers "
    "are rounds, arrows follow the run. A cross at base has the {level} intervals of "
    "random vectors of the last stage's KL.",
    "token_kl": "Distribution of the per-token KL to base over the completions below, all rounds; "
    f"the axis begins at {LEAST_KL:g} nats.",
    "kl_tokens": "Per-token KL to base of the completions of the first round, with tau.",
    "doses": "Share of probes that the filter keeps, {level} Wilson intervals, and their median "
    "perplexity under base. The filter drops a text whose last quarter is above its limit.",
    "foundations": "Shift of all seven foundations from base, {level} intervals. The axis expects "
    "\u25b2 up and \u25bc down, and no shift of the others. Grey intervals at 0 are those "
    "of random vectors of each stage's KL.",
    "cosines": "Cosine of each round's steering vector to the first and to the last round's: mean "
    "over the band's layers, bars from the least to the greatest layer.",
    "barrier": "D is the aggregated KL of a completion to its reference, the barrier starts at "
    "tau, lambda is its weight. Steps count over all rounds: {starts}.",
}
"""With the confidence `level` and the step at which each round `starts` left open."""
Interval = tuple[float, float]


def _rounds(panel: Axes, rounds: Iterable[int]) -> None:
    numbers = sorted(set(rounds))
    panel.set_xticks(numbers[:: 1 + len(numbers) // 12])
    panel.set_xlim(numbers[0] - 0.4, numbers[-1] + 0.4)


def _survival(e: Event, confidence: float) -> tuple[float, Interval]:
    share, samples = e["survival"], e["samples"]
    if samples < 1 or not 0 <= share <= 1:
        return share, (share, share)
    return share, wilson(round(share * samples), samples, confidence)


@fig.styled
def trajectory(events: Sequence[Event], axis: Axis, confidence: float = 0.95) -> Figure:
    """Trait, coherence and survival per round, with reference lines.

    The trait is the cloze's shift where that is valid on this model, else the shift of the axis's
    foundations; coherence is the use of context where that is valid, else the valid-answer mass.
    """
    measured = [*stages(events, "steered"), *stages(events, "healed")]
    require(bool(measured), "no steered or healed stage has been measured.")
    base = stages(events, "base")[0]
    way = {1: "up", -1: "down"}

    def shift(name: str, e: Event) -> tuple[float, Interval]:
        return e["shift"][name], e["shift_interval"][name]

    def read(instrument: str, e: Event) -> tuple[float, Interval]:
        found = items_of(events, instrument, e)
        require(found is not None, f"{e['stage']} of round {e['round']} lacks {instrument}.")
        assert found is not None
        return found["value"], found["interval"]

    def mass(e: Event) -> tuple[float, Interval]:
        return e["coherence"], e["coherence_interval"]

    m = Measurements(events, (), axis, EvalConfig(confidence=confidence))
    panels: list[tuple[str, Callable[[Event], tuple[float, Interval]], float | None]] = [
        (f"{name} shift [nats], {way[sign]} is on-trait", partial(shift, name), None)
        for name, sign in axis.expected.items()
    ]
    if m.by_cloze:
        panels = [("cloze shift [nats], up is on-trait", partial(read, "cloze"), None)]
    traits = ["cloze"] if m.by_cloze else [*axis.expected]
    panels += [
        ("coherence [use of context / base]", partial(read, "context"), COHERENT)
        if m.uses_context
        else ("coherence [mass / base]", mass, COHERENT),
        (
            "survival [share of texts]",
            lambda e: _survival(e, confidence),
            base["survival"] - SURVIVAL_LOSS,
        ),
    ]
    figure, axes = fig.grid(len(panels), 2)
    for number, (panel, (title, measure, threshold)) in enumerate(zip(axes, panels, strict=True)):
        panel.set(title=title, xlabel="round")
        if title.startswith("coherence"):
            fig.log_axis(panel, "y", [v for e in measured for v in (measure(e)[0], *measure(e)[1])])
        for name, aside in (("steered", -0.04), ("healed", 0.04)):
            found = stages(events, name)
            values = [measure(e) for e in found]
            if found:
                fig.series(
                    panel,
                    [e["round"] + aside for e in found],
                    [value for value, _ in values],
                    LOOKS[name],
                    name,
                    y_spans=[interval for _, interval in values],
                )
        for instrument in traits[number : number + 1]:
            spans = [(e, m.null_interval(e, instrument)) for e in measured]
            random = [(e, span) for e, span in spans if span is not None]
            if random:
                fig.series(
                    panel,
                    [e["round"] + (-0.04 if e["stage"] == "steered" else 0.04) for e, _ in random],
                    [0.0] * len(random),
                    RANDOM,
                    RANDOM_LABEL,
                    y_spans=[span for _, span in random],
                )
        for name in ("base", "prompted+", "prompted-"):
            for e in stages(events, name)[:1]:
                value, interval = measure(e)
                fig.rule(panel, value, LOOKS[name], name, span=() if name == "base" else interval)
        if threshold is not None:
            fig.rule(panel, threshold, ("text", "", ":"), "Q2 needs more")
        _rounds(panel, (e["round"] for e in measured))
    fig.layout(figure)
    return figure


@fig.styled
def plane(events: Sequence[Event], axis: Axis, confidence: float = 0.95) -> Figure:
    """Care against authority: a point per stage, numbered by round, arrows in order of the run, and
    where random vectors of the last stage's KL take base."""
    figure, (panel,) = fig.grid(1, 1, (5.6, 4.0))
    panel.set(title="authority [nats]", xlabel="care [nats]")
    order = [e for e in events if e["event"] == "stage"]
    points = [
        (e["nats"]["care"], e["nats"]["authority"])
        for e in order
        if not e["stage"].startswith("prompted")
    ]
    for name in LOOKS:
        found = [e for e in order if e["stage"] == name]
        if not found:
            continue
        x, y = ([e["nats"][f] for e in found] for f in ("care", "authority"))
        fig.series(panel, x, y, (*LOOKS[name][:2], "none"), name)
        for e, place in zip(found, zip(x, y, strict=True), strict=True):
            label = "" if e["round"] < 0 else str(e["round"])
            fig.point_label(panel, label, place, LOOKS[name])
    m = Measurements(events, (), axis, EvalConfig(confidence=confidence))
    spans = [m.null_interval(order[-1], name) for name in ("care", "authority")]
    for base in stages(events, "base")[: all(spans)]:
        at = [base["nats"][name] for name in ("care", "authority")]
        ends = [
            [(x + low, x + high)] for x, (low, high) in zip(at, filter(None, spans), strict=True)
        ]
        label = "random vectors of the last stage's KL"
        fig.series(panel, at[:1], at[1:], RANDOM, label, x_spans=ends[0], y_spans=ends[1])
    grey = fig.HUES["grey"]
    for start, end in pairwise(points):
        arrow = {"arrowstyle": "->", "color": grey, "lw": 0.8, "shrinkA": 4, "shrinkB": 4}
        panel.annotate("", end, start, arrowprops=arrow)
    panel.margins(0.12)
    fig.layout(figure, 3)
    return figure


@fig.styled
def kl_tokens(events: Sequence[Event]) -> Figure:
    """Per-token KL to base of each completion of the first round that recorded any, with tau."""
    found = [e for e in of_round(events, "token_kl") if e["curves"]]
    require(bool(found), "no completion has token divergences.")
    index, curves = found[0]["round"], found[0]["curves"]
    tau = next(e["tau"] for e in of_round(events, "healing") if e["round"] == index)
    longest = max(len(curve["kl"]) for curve in curves)
    figure, panels = fig.grid(len(curves), 1, (min(40.0, max(9.0, 0.105 * longest)), 1.5))
    for panel, curve in zip(panels, curves, strict=True):
        kl = np.array(curve["kl"])
        panel.set_title("KL to base [nats]")
        fig.finite(panel, "y", curve["kl"])
        panel.set_title(
            f"KL to base [nats], {curve['verdict']} at dose {curve['dose']:.2f}: mean "
            f"{kl.mean():.2f}, rmse {(kl**2).mean() ** 0.5:.2f}, max {kl.max():.2f}"
        )
        panel.bar(range(len(kl)), kl, color=fig.HUES[VERDICTS[curve["verdict"]][0]])
        fig.rule(panel, tau, ("text", "", ":"), f"tau {tau:g}")
        # A token may be a page of text, which would cover the panel.
        texts = [drawable(clean(repr(piece[:16])[1:-1]), FONT)[:12] for piece in curve["pieces"]]
        panel.set_xticks(
            range(len(kl)), texts, rotation=90, rotation_mode="anchor", ha="right", va="center",
            fontsize=6,
        )  # fmt: skip
        panel.set_xlim(-0.8, longest - 0.2)
    fig.layout(figure, bottom=0.8)
    return figure


@fig.styled
def token_kl(events: Sequence[Event], tau: float) -> Figure:
    """Distribution of the per-token KL of kept, dropped and healed completions, all rounds."""
    groups: dict[str, list[float]] = {}
    for e in of_round(events, "token_kl"):
        for curve in e["curves"]:
            groups.setdefault(curve["verdict"], []).extend(curve["kl"])
    require(bool(groups), "no completion has token divergences.")
    figure, (panel,) = fig.grid(1, 1)
    panel.set(title="share of tokens at or below", xlabel="KL to base [nats]")
    named = {f"{name} ({len(kl)} tokens)": (VERDICTS[name], kl) for name, kl in groups.items()}
    fig.ecdf(panel, named, LEAST_KL, tau)
    fig.layout(figure, 2)
    return figure


@fig.styled
def doses(
    events: Sequence[Event],
    texts: Sequence[Event],
    loop: Mapping[str, Any],
    confidence: float = 0.95,
) -> Figure:
    """Filter survival and median base perplexity against the dose, a line per round's ladder."""
    rungs = ladders(texts)
    require(bool(rungs), "no dose has been probed.")
    figure, (left, right) = fig.grid(2, 2)
    left.set(title="survival [share of probes]", xlabel="dose [times the raw vector]")
    right.set(title="median base perplexity", xlabel="dose [times the raw vector]")
    limit = loop["filter"]["max_tail_perplexity"]
    medians = [r["perplexity"] for ladder in rungs.values() for r in ladder]
    fig.log_axis(right, "y", [*filter(math.isfinite, medians), limit])
    # A little apart, since survival takes few values and intervals would cover each other.
    apart = 0.012 * max(abs(r["dose"]) for ladder in rungs.values() for r in ladder)
    for i, (look, (index, ladder)) in enumerate(
        zip(fig.looks(len(rungs)), rungs.items(), strict=True)
    ):
        fig.series(
            left,
            [r["dose"] + apart * (i - (len(rungs) - 1) / 2) for r in ladder],
            [r["kept"] / r["generated"] for r in ladder],
            look,
            f"round {index}",
            y_spans=[wilson(int(r["kept"]), int(r["generated"]), confidence) for r in ladder],
        )
        known = [r for r in ladder if math.isfinite(r["perplexity"])]
        dose, perplexity = ([r[key] for r in known] for key in ("dose", "perplexity"))
        fig.series(right, dose, perplexity, look, f"round {index}")
    for base in stages(events, "base")[:1]:
        fig.rule(left, base["survival"], LOOKS["base"], "base")
        if base["perplexity"] is not None:
            fig.rule(right, base["perplexity"], LOOKS["base"], "base")
    target = loop["dose"]["target_survival"]
    fig.rule(left, target, ("text", "", ":"), f"target survival {target:g}")
    fig.rule(right, limit, ("text", "", "-."), f"limit of a text's tail perplexity {limit:g}")
    left.set_ylim(-0.02, 1.02)
    fig.layout(figure, 4)
    return figure


@fig.styled
def foundations(events: Sequence[Event], axis: Axis, confidence: float = 0.95) -> Figure:
    """Shift of all seven foundations: the prompted personas, then a panel per round."""
    rounds = sorted({e["round"] for e in events if e["event"] == "stage" and e["round"] >= 0})
    groups = [("prompted personas, no training", ("prompted+", "prompted-"), -1)]
    groups += [(f"round {index}", ("steered", "healed"), index) for index in rounds]
    found = [
        (title, [e for name in names for e in stages(events, name) if e["round"] == index])
        for title, names, index in groups
    ]
    found = [(title, group) for title, group in found if group]
    require(bool(found), "no prompted, steered or healed stage has been measured.")
    m = Measurements(events, (), axis, EvalConfig(confidence=confidence))
    marks = {1: " \u25b2", -1: " \u25bc", None: ""}
    names = [f"{name}{marks[axis.expected.get(name)]}" for name in FOUNDATIONS]
    figure, panels = fig.grid(len(found), 3, (3.2, 2.4), sharey=True)
    for panel, (title, group) in zip(panels, found, strict=True):
        panel.set(title=title, xlabel="shift from base [nats]")
        panel.grid(axis="x")
        panel.xaxis.set_major_locator(MaxNLocator(5))
        for e, aside in zip(group, (-0.13, 0.13), strict=False):
            colour, marker, _ = LOOKS[e["stage"]]
            fig.series(
                panel,
                [e["shift"][name] for name in FOUNDATIONS],
                [i + aside for i in range(len(FOUNDATIONS))],
                (colour, marker, "none"),
                e["stage"],
                x_spans=[e["shift_interval"][name] for name in FOUNDATIONS],
            )
            spans = [m.null_interval(e, name) for name in FOUNDATIONS]
            known = [(i, span) for i, span in enumerate(spans) if span is not None]
            if known:
                fig.series(
                    panel,
                    [0.0] * len(known),
                    [i + 2 * aside for i, _ in known],
                    RANDOM,
                    RANDOM_LABEL,
                    x_spans=[span for _, span in known],
                )
        fig.rule(panel, 0.0, LOOKS["base"], "base", along="x")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    fig.layout(figure, left=1.05, gap=0.35)
    return figure


@fig.styled
def cosines(vectors: Sequence[tuple[int, SteeringVector]]) -> Figure:
    """Cosine of each round's vector to the first and the last: mean over layers, and range."""
    require(bool(vectors), "no round has a vector.")
    figure, (panel,) = fig.grid(1, 1)
    panel.set(title="cosine", xlabel="round")
    for name, (index, other), look, aside in (
        ("first", vectors[0], ("indigo", "o", "-"), -0.04),
        ("last", vectors[-1], ("orange", "D", "--"), 0.04),
    ):
        every = [list(vector.cosine(other).values()) for _, vector in vectors]
        fig.series(
            panel,
            [i + aside for i, _ in vectors],
            [sum(found) / len(found) for found in every],
            look,
            f"to the {name} (round {index})",
            y_spans=[(min(found), max(found)) for found in every],
        )
    fig.rule(panel, 0.0, LOOKS["base"], "orthogonal")
    _rounds(panel, (i for i, _ in vectors))
    fig.layout(figure, 2)
    return figure


@fig.styled
def barrier(events: Sequence[Event]) -> Figure:
    """Divergence, its weight, tokens above tau and gradient norms per training step."""
    healing = of_round(events, "healing")
    require(bool(healing), "no round has been trained.")
    steps = [step for e in healing for step in e["steps"]]
    starts = list(accumulate(len(e["steps"]) for e in healing[:-1]))
    figure, panels = fig.grid(5, 3, (3.3, 1.8), sharex=True)
    for panel, (title, lines) in zip(panels, STEP_CHARTS.items(), strict=True):
        panel.set(title=title, xlabel="training step, all rounds")
        panel.tick_params(labelbottom=True)
        for key, (label, look) in lines.items():
            fig.series(panel, range(len(steps)), [step[key] for step in steps], look, label)
        for start in starts:
            fig.rule(panel, start - 0.5, ("grey", "", ":"), "_round", along="x")
    for tau in sorted({e["tau"] for e in healing}):
        fig.rule(panels[0], tau, ("text", "", ":"), f"tau {tau:g}")
    for panel in panels:
        panel.set_ylim(bottom=min(0.0, panel.get_ylim()[0]))
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    fig.layout(figure, 8)
    return figure


def charts(
    folder: Path,
    config: Mapping[str, Any],
    axis: Axis,
    events: Sequence[Event],
    texts: Sequence[Event],
) -> dict[str, fig.Chart]:
    """By name, every chart that a record of this length can have, vectors from `folder`."""
    loop = config["loop"]
    confidence = loop["eval"]["confidence"]
    level = f"{100 * confidence:g} %"
    present = {e["stage"] if e["event"] == "stage" else e["event"] for e in events}
    healing = of_round(events, "healing")
    starts = accumulate((len(e["steps"]) for e in healing), initial=0)
    steps = zip(healing, starts, strict=False)
    where = ", ".join(f"round {e['round']} from step {at}" for e, at in steps)

    def vectors() -> Figure:
        rounds = [e["round"] for e in events if e["event"] == "vector"]
        paths = {i: folder / "rounds" / str(i) / "vector.safetensors" for i in rounds}
        return cosines([(i, SteeringVector.load(path)) for i, path in paths.items()])

    def shifts() -> Figure:
        return foundations(events, axis, confidence)

    drawings: dict[str, tuple[set[str], Callable[[], Figure]]] = {
        "trajectory": ({"steered", "healed"}, lambda: trajectory(events, axis, confidence)),
        "plane": ({"steered", "healed"}, lambda: plane(events, axis, confidence)),
        "token_kl": ({"token_kl"}, lambda: token_kl(events, tau_of(events, loop["heal"]["tau"]))),
        "kl_tokens": ({"token_kl"}, lambda: kl_tokens(events)),
        "doses": ({"probe"}, lambda: doses(events, texts, loop, confidence)),
        "foundations": ({"prompted+", "steered", "healed"}, shifts),
        "cosines": ({"vector"}, vectors),
        "barrier": ({"healing"}, lambda: barrier(events)),
    }
    return {
        name: fig.chart(name, CAPTIONS[name].format(level=level, starts=where), draw)
        for name, (needs, draw) in drawings.items()
        if needs & present
    }


def tau_of(events: Sequence[Event], setting: float) -> float:
    """Where the barrier starts [nats]: in the last training, before any the setting."""
    healing = of_round(events, "healing")
    return float(healing[-1]["tau"]) if healing else setting
