"""Charts as inline SVG: curves with intervals both ways, bars, distributions, reference lines.

Shapes take their colour from CSS classes (`PALETTE`) and text from `currentColor`, so one drawing
serves light and dark. A series has a marker besides its colour, a reference line a dash pattern.
"""

from collections.abc import Sequence
from itertools import pairwise

from markupsafe import Markup

from experiments.report.escape import safe
from experiments.report.scales import AxisSpec
from experiments.report.svg_frame import (
    ROW,
    Frame,
    Point,
    Rule,
    Series,
    axes,
    legend,
    names_beside,
    rule_across,
)
from experiments.report.svg_shapes import (
    CHARACTER,
    DASHES,
    MARKERS,
    PALETTE,
    marker,
    number,
    rect,
    text,
    whisker,
)

__all__ = ["Point", "Rule", "Series", "chart", "styles", "told"]


def styles(count: int) -> list[tuple[str, str, str]]:
    """(colour, marker, dash) of each of many series; the first 12 differ in both of the first.

    Example:
        >>> len(set(styles(24)))
        24
    """
    names = [name for name in PALETTE if name not in ("ink", "grey")] + ["ink", "grey"]
    dashes = ("", *DASHES)
    return [(names[i % 12], MARKERS[i % 12], dashes[i // 12 % len(dashes)]) for i in range(count)]


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
        height = max(height, Frame.top + Frame.bottom + ROW * (len(series) - 1))
    frame = Frame(width, height)
    if y.ticks is not None:
        frame.left = 14 + CHARACTER * max(len(text) for text in y.ticks.values())
    if direct:
        frame.right = 18 + CHARACTER * max(len(s.name) for s in series)
    frame.scales(x, y, series, rules)
    axes(frame)
    for rule in rules:
        rule_across(frame, rule)
    bars = [s for s in series if s.kind == "bars"]
    for one in series:
        frame.parts.append(f'<g class="c-{one.colour}">')
        if one.kind == "bars":
            _bars(frame, one, bars.index(one), len(bars))
        else:
            _curve(frame, one)
        frame.parts.append("</g>")
    if direct:
        names_beside(frame, series)
    listed = [*(() if direct else [s for s in series if s.name]), *[r for r in rules if r.name]]
    bottom = legend(frame, listed)
    head = (
        f'<svg class="chart" role="img" viewBox="0 0 {number(width)} {number(bottom)}" '
        'width="100%" preserveAspectRatio="xMidYMin meet">'
        f"<title>{safe(title)}</title><desc>{safe(desc)}</desc>"
    )
    return Markup(head + "".join(frame.parts) + "</svg>")


def _curve(f: Frame, s: Series) -> None:
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


def _bars(f: Frame, s: Series, index: int, count: int) -> None:
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
