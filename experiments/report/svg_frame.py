"""What a chart is made of, and the frame around it: scales, axes, reference lines, names."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from experiments.report.scales import AxisSpec, Scale
from experiments.report.svg_shapes import CHARACTER, line, marker, rect, text

ROW = 14.0
"""Least distance between two names beside the plot."""
Interval = tuple[float, float]


@dataclass(frozen=True)
class Point:
    """One measurement; `label` is written beside it, `aside` moves the drawing of it, right and
    down, where others would cover it."""

    x: float
    y: float
    x_interval: Interval | None = None
    y_interval: Interval | None = None
    label: str = ""
    aside: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Series:
    """Points of one name, drawn as a line, loose points, steps or bars, in that order."""

    name: str
    points: Sequence[Point]
    colour: str = "ink"
    marker: str | None = "circle"
    kind: Literal["line", "points", "steps", "bars"] = "line"
    dash: str = ""


@dataclass(frozen=True)
class Rule:
    """A reference line across the plot, named in the legend, with its interval as a band; one
    without a name only parts."""

    name: str
    value: float
    along: Literal["x", "y"] = "y"
    colour: str = "grey"
    dash: str = "6 4"
    interval: Interval | None = None


@dataclass
class Frame:
    """The plot's rectangle and its two scales."""

    width: float
    height: float
    left: float = 56
    right: float = 14
    top: float = 30
    bottom: float = 44
    parts: list[str] = field(default_factory=list)

    def scales(
        self, x: AxisSpec, y: AxisSpec, series: Sequence[Series], rules: Sequence[Rule]
    ) -> None:
        """Scales that hold every point, interval and reference line."""
        points = [p for s in series for p in s.points]
        xs = [v for p in points for v in (p.x, *(p.x_interval or ()))]
        ys = [v for p in points for v in (p.y, *(p.y_interval or ()))]
        xs += [v for r in rules if r.along == "x" for v in (r.value, *(r.interval or ()))]
        ys += [v for r in rules if r.along == "y" for v in (r.value, *(r.interval or ()))]
        aside = 0.06
        if any(s.kind == "bars" for s in series):
            ys.append(0.0)
            # Half a place more on either side, for the first and the last bars.
            aside = 0.45 / max(1, len({p.x for p in points}) - 1)
        self.x = Scale(x, xs, self.left, self.width - self.right, pad=aside)
        self.y = Scale(y, ys, self.height - self.bottom, self.top, pad=0.06)


def axes(f: Frame) -> None:
    """Ticks, grid and the names of both axes."""
    low, high = f.height - f.bottom, f.width - f.right
    for value, name in f.y.ticks():
        at = f.y(value)
        f.parts.append(line(f.left, at, high, at, ' class="grid"'))
        f.parts.append(text(f.left - 7, at + 4.5, name, "end"))
    for value, name in _apart(f.x, high - f.left):
        at = f.x(value)
        f.parts.append(line(at, low, at, low + 5, ' class="axis"'))
        f.parts.append(text(at, low + 19, name, "middle"))
    f.parts.append(line(f.left, low, high, low, ' class="axis"'))
    unit = " (log)"
    f.parts.append(text(4, 15, f.y.spec.label + unit * f.y.spec.log, extra=' class="label"'))
    f.parts.append(
        text(
            (f.left + high) / 2,
            f.height - 6,
            f.x.spec.label + unit * f.x.spec.log,
            "middle",
            ' class="label"',
        )
    )


def _apart(scale: Scale, room: float) -> list[tuple[float, str]]:
    """As many of the ticks, evenly, as have room for their texts."""
    ticks = scale.ticks()
    widest = CHARACTER * (2 + max((len(text) for _, text in ticks), default=0))
    return ticks[:: max(1, math.ceil(len(ticks) * widest / room))]


def rule_across(f: Frame, rule: Rule) -> None:
    """A reference line with its band."""
    style = f' class="rule" stroke-dasharray="{rule.dash}"'
    left, right, top, low = f.left, f.width - f.right, f.top, f.height - f.bottom
    scale = f.y if rule.along == "y" else f.x
    at = scale(rule.value)
    f.parts.append(f'<g class="c-{rule.colour}">')
    if rule.interval is not None:
        a, b = sorted(map(scale, rule.interval))
        box = (left, a, right - left, b - a) if rule.along == "y" else (a, top, b - a, low - top)
        f.parts.append(rect(*box, rule.name, "band"))
    f.parts.append(
        line(*((left, at, right, at) if rule.along == "y" else (at, top, at, low)), style)
    )
    f.parts.append("</g>")


def names_beside(f: Frame, series: Sequence[Series]) -> None:
    """Names at the last points, pushed apart where they would overlap, within the plot."""
    order = sorted((f.y(s.points[-1].y), i) for i, s in enumerate(series) if s.points)
    places: list[float] = []
    for at, _ in order:
        places.append(max(at, places[-1] + ROW if places else at))
    limit = f.height - f.bottom
    for k in reversed(range(len(places))):
        places[k] = min(places[k], limit)
        limit = places[k] - ROW
    for (at, i), place in zip(order, places, strict=True):
        one = series[i]
        x = f.width - f.right + 6
        f.parts.append(f'<g class="c-{one.colour}">')
        f.parts.append(line(f.x(one.points[-1].x), at, x, place, ' class="leader"'))
        f.parts.append(text(x + 3, place + 4.5, one.name, extra=' class="named"') + "</g>")


def legend(f: Frame, listed: Sequence[Series | Rule]) -> float:
    """Rows of names below the plot; where the drawing ends."""
    x, y = 6.0, f.height + 14
    for one in listed:
        wide = 34 + CHARACTER * len(one.name) + 10
        if x > 6 and x + wide > f.width:
            x, y = 6.0, y + 20
        dash = f' stroke-dasharray="{one.dash}"' if one.dash else ""
        f.parts.append(f'<g class="c-{one.colour}">')
        if isinstance(one, Rule):
            f.parts.append(line(x, y, x + 26, y, f' class="rule"{dash}'))
        else:
            if one.kind in ("line", "steps"):
                f.parts.append(line(x, y, x + 26, y, f' class="curve"{dash}'))
            mark = "square" if one.kind == "bars" else one.marker
            f.parts.append(marker(mark, x + 13, y) if mark else "")
        f.parts.append("</g>" + text(x + 32, y + 4.5, one.name))
        x += wide
    return y + 12 if listed else f.height + 2
