"""Charts as inline SVG: curves with intervals both ways, bars, distributions, reference lines.

Shapes take their colour from CSS classes (`PALETTE`) and text from `currentColor`, so one drawing
serves light and dark. A series has a marker besides its colour, a reference line a dash pattern.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from markupsafe import Markup

from experiments.scales import AxisSpec, Scale
from experiments.shown import safe
from experiments.svg_shapes import (
    CHARACTER,
    DASHES,
    MARKERS,
    PALETTE,
    line,
    marker,
    number,
    rect,
    text,
    whisker,
)

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


def styles(count: int) -> list[tuple[str, str, str]]:
    """(colour, marker, dash) of each of many series; the first 12 differ in both of the first.

    Example:
        >>> len(set(styles(24)))
        24
    """
    names = [name for name in PALETTE if name not in ("ink", "grey")] + ["ink", "grey"]
    dashes = ("", *DASHES)
    return [(names[i % 12], MARKERS[i % 12], dashes[i // 12 % len(dashes)]) for i in range(count)]


@dataclass
class _Frame:
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


def chart(
    series: Sequence[Series],
    x: AxisSpec,
    y: AxisSpec,
    *,
    title: str,
    desc: str,
    rules: Sequence[Rule] = (),
    direct: bool = False,
    width: float = 380,
    height: float = 240,
) -> Markup:
    """One drawing with its legend.

    Args:
        title, desc: what a reader who does not see it is told.
        direct: series are named at their last point, in place of an entry in the legend; the
            drawing is made high enough for all names.
        width, height: of the plot with its axes, in units of which text is 13 high; the legend
            comes below.

    Raises:
        ShlError: nothing to draw, or a number that an axis cannot hold.
    """
    if direct:
        height = max(height, _Frame.top + _Frame.bottom + ROW * (len(series) - 1))
    frame = _Frame(width, height)
    if y.ticks is not None:
        frame.left = 14 + CHARACTER * max(len(text) for text in y.ticks.values())
    if direct:
        frame.right = 18 + CHARACTER * max(len(s.name) for s in series)
    frame.scales(x, y, series, rules)
    _axes(frame)
    for rule in rules:
        _rule(frame, rule)
    bars = [s for s in series if s.kind == "bars"]
    for one in series:
        frame.parts.append(f'<g class="c-{one.colour}">')
        if one.kind == "bars":
            _bars(frame, one, bars.index(one), len(bars))
        else:
            _curve(frame, one)
        frame.parts.append("</g>")
    if direct:
        _direct(frame, series)
    listed = [*(() if direct else [s for s in series if s.name]), *[r for r in rules if r.name]]
    bottom = _legend(frame, listed)
    head = (
        f'<svg class="chart" role="img" viewBox="0 0 {number(width)} {number(bottom)}" '
        'width="100%" preserveAspectRatio="xMidYMin meet">'
        f"<title>{safe(title)}</title><desc>{safe(desc)}</desc>"
    )
    return Markup(head + "".join(frame.parts) + "</svg>")


def _axes(f: _Frame) -> None:
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


def _rule(f: _Frame, rule: Rule) -> None:
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


def _curve(f: _Frame, s: Series) -> None:
    places = [(f.x(p.x) + p.aside[0], f.y(p.y) + p.aside[1]) for p in s.points]
    dash = f' stroke-dasharray="{s.dash}"' if s.dash else ""
    if s.kind != "points" and len(places) > 1:
        path = f"M{number(places[0][0])} {number(places[0][1])}"
        for x, y in places[1:]:
            path += (
                f"H{number(x)}V{number(y)}" if s.kind == "steps" else f"L{number(x)} {number(y)}"
            )
        f.parts.append(f'<path class="curve" d="{path}"{dash}/>')
    for p, (x, y) in zip(s.points, places, strict=True):
        if p.y_interval is not None:
            low, high = f.y(p.y_interval[0]), f.y(p.y_interval[1])
            f.parts.append(
                whisker([(x, low, x, high), *((x - 3, v, x + 3, v) for v in (low, high))])
            )
        if p.x_interval is not None:
            low, high = f.x(p.x_interval[0]), f.x(p.x_interval[1])
            f.parts.append(
                whisker([(low, y, high, y), *((v, y - 3, v, y + 3) for v in (low, high))])
            )
        if s.marker is not None:
            f.parts.append(marker(s.marker, x, y, told(s.name, p, f.x.spec, f.y.spec)))
        if p.label:
            f.parts.append(text(x + 7, y - 7, p.label, extra=' class="point"'))


def told(name: str, p: Point, x: AxisSpec, y: AxisSpec) -> str:
    """What a point says of itself when it is pointed at.

    Example:
        >>> p = Point(1, 0.5, y_interval=(0.4, 0.6))
        >>> told("healed", p, AxisSpec("round"), AxisSpec("shift [nats]"))
        'healed: round 1, shift [nats] 0.5 (0.4 to 0.6)'
    """
    parts = []
    for spec, value, interval in ((x, p.x, p.x_interval), (y, p.y, p.y_interval)):
        between = f" ({interval[0]:.3g} to {interval[1]:.3g})" if interval else ""
        where = (spec.ticks or {}).get(value, f"{value:.3g}")
        parts.append(f"{spec.label} {where}{between}".strip())
    return f"{name}{' ' * bool(p.label)}{p.label}: {', '.join(parts)}"


def _bars(f: _Frame, s: Series, index: int, count: int) -> None:
    """Bars of several series side by side; as wide as the nearest two places allow."""
    places = sorted({f.x(p.x) for p in s.points})
    gap = min((b - a for a, b in pairwise(places)), default=60.0)
    each = min(40.0, 0.8 * gap) / count
    ground = f.y(0.0)
    for p in s.points:
        left = f.x(p.x) + (index - count / 2) * each
        top = min(ground, f.y(p.y))
        height = abs(f.y(p.y) - ground)
        f.parts.append(rect(left, top, each * 0.92, height, told(s.name, p, f.x.spec, f.y.spec)))


def _direct(f: _Frame, series: Sequence[Series]) -> None:
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


def _legend(f: _Frame, listed: Sequence[Series | Rule]) -> float:
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
