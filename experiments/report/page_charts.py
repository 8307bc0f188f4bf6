"""The report's charts, from a run's events and texts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from markupsafe import Markup

from experiments.questions.estimates import wilson
from experiments.questions.thresholds import COHERENT
from experiments.record.reader import Event, stages
from experiments.report.scales import AxisSpec
from experiments.report.svg import chart
from experiments.report.svg_frame import Point, Rule, Series
from shl.config import FOUNDATIONS
from shl.method.axes import Axis
from shl.utils.errors import ShlError


@dataclass(frozen=True)
class Figure:
    """A drawing, or the sentence that says why there is none, and what it shows."""

    caption: str
    drawing: Markup | None
    problem: str = ""


def drawn(caption: str, make: Callable[[], Markup]) -> Figure:
    """A chart, or why it cannot be drawn."""
    try:
        return Figure(caption, make())
    except ShlError as error:
        return Figure(caption, None, str(error))


def _rounds(found: Sequence[Event]) -> AxisSpec:
    return AxisSpec("round", ticks={float(e["round"]): str(e["round"]) for e in found})


Measure = Callable[[Event], tuple[float, tuple[float, float] | None] | None]


def _sides(events: Sequence[Event], measure: Measure) -> list[Series]:
    """Steered red, healed green; a little apart, so that intervals do not cover each other."""
    found = []
    for name, colour, marker, aside in (
        ("steered", "red", "circle", -4.0),
        ("healed", "green", "square", 4.0),
    ):
        points = []
        for e in stages(events, name):
            read = measure(e)
            if read is not None:
                points.append(Point(e["round"], read[0], y_interval=read[1], aside=(aside, 0.0)))
        if points:
            found.append(Series(name, points, colour, marker))
    return found


def _references(events: Sequence[Event], measure: Measure) -> list[Rule]:
    rules = []
    for name, colour, dash in (
        ("base", "grey", "6 4"),
        ("prompted+", "blue", "2 3"),
        ("prompted-", "purple", "9 3 2 3"),
    ):
        for e in stages(events, name)[:1]:
            read = measure(e)
            if read is not None:
                interval = None if name == "base" else read[1]
                rules.append(Rule(name, read[0], colour=colour, dash=dash, interval=interval))
    return rules


def trajectory(events: Sequence[Event], axis: Axis) -> list[Figure]:
    """Trait and coherence per stage, with base and the prompted personas as reference lines."""
    measured = [*stages(events, "steered"), *stages(events, "healed")]
    if not measured:
        return []

    def panel(
        title: str, label: str, caption: str, measure: Measure, *more: Rule, log: bool = False
    ) -> Figure:
        series, rules = _sides(events, measure), [*_references(events, measure), *more]
        ends = [v for s in series for p in s.points for v in (p.y, *(p.y_interval or ()))]
        log = log and min([*ends, *(r.value for r in rules)], default=0.0) > 0
        return drawn(
            caption,
            lambda: chart(
                series,
                _rounds(measured),
                AxisSpec(label, log=log),
                title=title,
                desc=caption + " " + spoken(series),
                rules=rules,
            ),
        )

    figures = []
    for name, sign in axis.expected.items():
        way = "up" if sign > 0 else "down"
        figures.append(
            panel(
                f"{name} shift per round",
                f"{name} shift [nats], {way} is on-trait",
                f"{name}: shift from base of the log of its mean probability; {way} is on-trait; "
                "95 % intervals paired by vignette.",
                partial(_shift, name),
            )
        )
    figures.append(
        panel(
            "coherence per round",
            "coherence [mass / base]",
            f"Coherence: probability on valid answers over base's; Q2 needs {COHERENT} or more of "
            "every healed stage.",
            lambda e: (e["coherence"], ordered(e["coherence_interval"])),
            Rule(f"Q2 needs {COHERENT}", COHERENT, colour="ink", dash="1 5"),
            log=True,
        )
    )
    base = stages(events, "base")[0]["survival"]
    figures.append(
        panel(
            "survival per round",
            "survival [share of texts]",
            f"Survival: share of free samples that pass the filter, 95 % Wilson intervals; "
            f"Q2 needs {COHERENT} of base's share.",
            _survival,
            Rule(f"Q2 needs {COHERENT} x base", COHERENT * base, colour="ink", dash="1 5"),
        )
    )
    return figures


def ordered(pair: Sequence[float]) -> tuple[float, float]:
    """An interval from low to high."""
    return min(pair), max(pair)


def _shift(name: str, e: Event) -> tuple[float, tuple[float, float] | None]:
    return e["shift"][name], ordered(e["shift_interval"][name])


def _survival(e: Event) -> tuple[float, tuple[float, float] | None]:
    share = e["survival"]
    sound = e["samples"] > 0 and 0 <= share <= 1
    return share, wilson(round(share * e["samples"]), e["samples"]) if sound else None


def spoken(series: Sequence[Series]) -> str:
    """The numbers themselves, for who does not see them."""
    return " ".join(
        f"{s.name}: {', '.join(f'{p.y:.3g}' for p in s.points[:40])}." for s in series if s.name
    )


def foundations(events: Sequence[Event], axis: Axis) -> list[Figure]:
    """Shift of all seven foundations per round, prompted personas first; on-axis ones marked."""
    marks = {1: "\u25b2", -1: "\u25bc"}
    names = {
        float(-i): f"{name} {marks[axis.expected[name]]}" if name in axis.expected else name
        for i, name in enumerate(FOUNDATIONS)
    }
    personas = [*stages(events, "prompted+")[:1], *stages(events, "prompted-")[:1]]
    rounds = sorted({e["round"] for e in events if e["event"] == "stage" and e["round"] >= 0})
    groups = [("prompted personas, no training", personas)] if personas else []
    for index in rounds:
        own = [e for n in ("steered", "healed") for e in stages(events, n) if e["round"] == index]
        groups.append((f"round {index}", own))
    looks = {
        "steered": ("red", "circle", -4.0),
        "healed": ("green", "square", 4.0),
        "prompted+": ("blue", "up", -4.0),
        "prompted-": ("purple", "down", 4.0),
    }
    figures = []
    for title, group in groups:
        series = []
        for e in group:
            colour, marker, aside = looks[e["stage"]]
            points = [
                Point(
                    e["shift"][name],
                    -i,
                    x_interval=ordered(e["shift_interval"][name]),
                    aside=(0.0, aside),
                )
                for i, name in enumerate(FOUNDATIONS)
            ]
            series.append(Series(e["stage"], points, colour, marker, "points"))
        figures.append(drawn("", partial(_profile, series, names, title)))
    return figures


def _profile(series: Sequence[Series], names: Mapping[float, str], title: str) -> Markup:
    told = (
        f"{s.name}: "
        + ", ".join(f"{n} {p.x:+.2f}" for n, p in zip(FOUNDATIONS, s.points, strict=True))
        for s in series
    )
    return chart(
        series,
        AxisSpec("shift from base [nats]"),
        AxisSpec(title, ticks=names),
        title=f"foundations, {title}",
        desc=f"Shift of each foundation from base with 95 % intervals. {'. '.join(told)}.",
        rules=[Rule("base", 0.0, along="x")],
        height=280,
    )
