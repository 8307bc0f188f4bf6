"""How numbers of several groups are spread, as charts."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from experiments.scales import AxisSpec
from experiments.svg import Point, Rule, Series, chart, styles
from experiments.svg_shapes import DASHES


def distribution(
    groups: Mapping[str, Sequence[float]],
    x: AxisSpec,
    *,
    title: str,
    desc: str,
    rules: Sequence[Rule] = (),
    low: float | None = None,
    colours: Sequence[str] = (),
    share: str = "share of tokens at or below",
) -> Markup:
    """Share of each group at or below a value: empirical distribution functions, as steps.

    Args:
        low: where the axis begins; what is below counts from there on.
        share: what the vertical axis is called.
    """
    found = styles(len(groups))
    series = []
    for i, (name, values) in enumerate(groups.items()):
        ranked = sorted(values)
        least = ranked[0] if low is None else low
        first = bisect_right(ranked, least)
        # At most some 200 steps: more are finer than a pixel.
        every = max(1, (len(ranked) - first) // 200)
        at = [k for k in range(first, len(ranked)) if k % every == 0 or k == len(ranked) - 1]
        points = [Point(least, first / len(ranked))]
        points += [Point(ranked[k], (k + 1) / len(ranked)) for k in at]
        colour = colours[i] if colours else found[i][0]
        dash = ("", *DASHES)[i % (len(DASHES) + 1)]
        series.append(Series(name, points, colour, None, "steps", dash))
    up = AxisSpec(share, low=0.0, high=1.0)
    return chart(series, x, up, title=title, desc=desc, rules=rules)


def histogram(
    groups: Mapping[str, Sequence[float]],
    edges: Sequence[float],
    x: AxisSpec,
    *,
    title: str,
    desc: str,
    rules: Sequence[Rule] = (),
) -> Markup:
    """Share of each group between neighbouring edges, as outlines; what is outside counts in the
    group's size but is not drawn."""
    found = styles(len(groups))
    series = []
    for (name, values), (colour, _, _), dash in zip(
        groups.items(), found, ("", *DASHES) * len(found), strict=False
    ):
        counts = [0] * (len(edges) - 1)
        for value in values:
            index = bisect_right(edges, value) - 1
            if value == edges[-1]:
                index = len(counts) - 1
            if 0 <= index < len(counts):
                counts[index] += 1
        shares = [count / len(values) for count in counts]
        points = [Point(edges[0], 0.0)]
        points += [Point(edge, share) for edge, share in zip(edges, shares, strict=False)]
        series.append(Series(name, _closed(points, edges[-1]), colour, None, "steps", dash))
    return chart(series, x, AxisSpec("share of tokens"), title=title, desc=desc, rules=rules)


def _closed(points: list[Point], end: float) -> list[Point]:
    """Steps that go up at the first edge and down to 0 at the last."""
    return [*points, Point(end, points[-1].y), Point(end, 0.0)]
