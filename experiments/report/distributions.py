"""How numbers of several groups are spread, as charts."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from experiments.report.scales import AxisSpec
from experiments.report.svg import chart, styles
from experiments.report.svg_frame import Point, Rule, Series
from experiments.report.svg_shapes import DASHES


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
