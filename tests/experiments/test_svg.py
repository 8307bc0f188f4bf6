"""Charts: where a number is drawn, what a legend names, and that both themes can be read."""

import re
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers import one_sentence

from experiments.report.distributions import distribution
from experiments.report.scales import AxisSpec, Scale
from experiments.report.svg import chart, styles
from experiments.report.svg_frame import Point, Rule, Series
from experiments.report.svg_shapes import MARKERS, PALETTE
from shl.utils.errors import ShlError

SVG = "{http://www.w3.org/2000/svg}"
TOLD = {"title": "a chart", "desc": "of something"}


def parsed(markup):
    """As XML: a stray tag, attribute or entity would not parse."""
    named = str(markup).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ')
    return ElementTree.fromstring(named)


def texts(root):
    return [element.text for element in root.iter(f"{SVG}text")]


def numbers(path):
    return [float(found) for found in re.findall(r"-?\d+\.?\d*", path)]


def test_a_scale_is_linear_or_logarithmic():
    linear = Scale(AxisSpec("x"), [2.0, 4.0], 100, 300)
    assert [linear(v) for v in (2, 3, 4)] == [100, 200, 300]
    # log10 of 0.01, 1 and 100 is -2, 0 and 2.
    log = Scale(AxisSpec("x", log=True), [0.01, 100.0], 0, 400)
    assert [log(v) for v in (0.01, 1, 100)] == [0, 200, 400]
    # A vertical axis runs upwards, from a large coordinate to a small one.
    assert Scale(AxisSpec("y"), [0.0, 1.0], 200, 0)(0.25) == 150


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("ends", [(0.97, 1.03), (0.004, 9.0), (1.0, 1.0), (3e-9, 2e8), (41, 47)])
def test_ticks_lie_on_the_axis_and_say_their_value(ends, log):
    scale = Scale(AxisSpec("x", log=log), ends, 0, 100, pad=0.05)
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 14
    for value, text in ticks:
        assert -1e-6 <= scale(value) <= 100 + 1e-6
        assert float(text.replace("\u2212", "-")) == pytest.approx(value, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize(
    ("log", "value"), [(False, float("nan")), (False, 1e308), (True, 0.0), (True, -1.0)]
)
def test_a_number_that_an_axis_cannot_hold_is_a_sentence(log, value):
    series = [Series("s", [Point(0, 1.0), Point(1, value)])]
    with pytest.raises(ShlError) as error:
        chart(series, AxisSpec("x"), AxisSpec("shift", log=log), **TOLD)
    assert "cannot be drawn" in one_sentence(error)
    with pytest.raises(ShlError) as error:
        chart([], AxisSpec("x"), AxisSpec("shift"), **TOLD)
    assert "no number to show" in one_sentence(error)


def test_points_intervals_and_reference_lines_lie_where_the_axis_says():
    points = [Point(1.0, 10.0, (0.0, 2.0), (8.0, 12.0), "round 1"), Point(3.0, 20.0)]
    rules = [Rule("tau", 15.0), Rule("here", 2.0, along="x", interval=(1.5, 2.5))]
    svg = chart(
        [Series("an arm", points, "teal")],
        AxisSpec("coherence", low=0.0, high=4.0),
        AxisSpec("shift", low=0.0, high=20.0),
        rules=rules,
        **TOLD,
    )
    root = parsed(svg)
    # The plot is 380 by 240 with margins 56, 14, 30 and 44: x over 56 to 366, y over 196 to 30.
    across, up = (lambda v: 56 + 310 * v / 4), (lambda v: 196 - 166 * v / 20)
    circles = [c for c in root.iter(f"{SVG}circle") if c.find(f"{SVG}title") is not None]
    assert [(float(c.get("cx")), float(c.get("cy"))) for c in circles] == [
        (pytest.approx(across(p.x), abs=0.1), pytest.approx(up(p.y), abs=0.1)) for p in points
    ]
    assert circles[0].find(f"{SVG}title").text == (
        "an arm round 1: coherence 1 (0 to 2), shift 10 (8 to 12)"
    )
    vertical, horizontal = [
        p.get("d") for p in root.iter(f"{SVG}path") if p.get("class") == "whisker"
    ]
    x, y = across(1), up(10)
    assert numbers(vertical)[:4] == pytest.approx([x, up(8), x, up(12)], abs=0.1)
    assert numbers(horizontal)[:4] == pytest.approx([across(0), y, across(2), y], abs=0.1)
    lines = [e for e in root.iter(f"{SVG}line") if e.get("class") == "rule"]
    assert float(lines[0].get("y1")) == float(lines[0].get("y2")) == pytest.approx(up(15), abs=0.1)
    assert (
        float(lines[1].get("x1")) == float(lines[1].get("x2")) == pytest.approx(across(2), abs=0.1)
    )
    (band,) = [e for e in root.iter(f"{SVG}rect") if e.get("class") == "band"]
    assert float(band.get("x")) == pytest.approx(across(1.5), abs=0.1)
    assert float(band.get("width")) == pytest.approx(across(1) - across(0), abs=0.1)
    assert {"an arm", "tau", "here", "round 1", "coherence", "shift"} <= set(texts(root))
    assert root.get("role") == "img"
    assert [root.find(f"{SVG}{name}").text for name in ("title", "desc")] == list(TOLD.values())


def test_hostile_names_are_text():
    bad = '</text><script x="1">&amp;\'{{ 1 }}</svg>\x00'
    seen = bad.replace("\x00", "\u2400")
    for kind, direct in (("line", False), ("line", True), ("bars", False)):
        one = Series(bad, [Point(0, 1.0, label=bad), Point(1, 2.0)], kind=kind)
        spec = AxisSpec(bad, ticks={0.0: bad})
        root = parsed(
            chart(
                [one], spec, AxisSpec(bad), title=bad, desc=bad, rules=[Rule(bad, 1)], direct=direct
            )
        )
        own = {"svg", "title", "desc", "g", "line", "path", "circle", "rect", "text"}
        assert {element.tag.removeprefix(SVG) for element in root.iter()} <= own
        # The name, the rule's, both axes', a tick, and a label where there are points.
        assert texts(root).count(seen) == (5 if kind == "bars" else 6)
        assert root.find(f"{SVG}title").text == root.find(f"{SVG}desc").text == seen
        assert any(
            t.text.startswith(f"{seen} {seen}: {seen} {seen}, ") for t in root.iter(f"{SVG}title")
        )


def test_bars_stand_on_zero_side_by_side():
    series = [
        Series("a", [Point(0, 1.0), Point(1, -1.0)], kind="bars"),
        Series("b", [Point(0, 2.0), Point(1, 0.5)], kind="bars"),
    ]
    y = AxisSpec("count", low=-2.0, high=2.0)
    root = parsed(chart(series, AxisSpec("x"), y, **TOLD))
    bars = [
        [float(r.get(k)) for k in ("x", "y", "width", "height")] for r in root.iter(f"{SVG}rect")
    ]
    # 166 units for -2 to 2: 41.5 each, 0 at y = 113.
    assert [bar[3] for bar in bars] == pytest.approx([41.5, 41.5, 83, 20.75], abs=0.1)
    assert [bar[1] for bar in bars] == pytest.approx([71.5, 113, 30, 92.25], abs=0.1)
    # No bar covers another, nor the axes.
    across = sorted((bar[0], bar[0] + bar[2]) for bar in bars)
    assert all(end <= start + 0.1 for (_, end), (start, _) in pairwise(across))
    assert across[0][0] >= 56
    assert across[-1][1] <= 366


def test_many_series_differ_in_colour_and_marker_and_are_all_named():
    looks = styles(14)
    series = [
        Series(
            f"arm {i}", [Point(0.1 * i, i), Point(0.1 * i + 1, i + 0.01)], *look[:2], dash=look[2]
        )
        for i, look in enumerate(looks)
    ]
    assert len({look[0] for look in looks[:12]}) == len({look[1] for look in looks[:12]}) == 12
    assert {look[1] for look in looks} == set(MARKERS)
    for direct in (False, True):
        root = parsed(chart(series, AxisSpec("x"), AxisSpec("y"), direct=direct, **TOLD))
        assert {s.name for s in series} <= set(texts(root))
        named = [t for t in root.iter(f"{SVG}text") if t.get("class") == "named"]
        heights = sorted(float(t.get("y")) for t in named)
        assert len(named) == (14 if direct else 0)
        assert all(b - a >= 14 - 0.11 for a, b in pairwise(heights))
    # What one curve of one point per arm at nearly one place would do.
    close = [Series(f"arm {i}", [Point(1.0, 1.0 + 1e-3 * i)]) for i in range(15)]
    close.append(Series("far above", [Point(1.0, 9.0)]))
    root = parsed(chart(close, AxisSpec("x"), AxisSpec("y"), direct=True, **TOLD))
    heights = sorted(
        float(t.get("y")) for t in root.iter(f"{SVG}text") if t.get("class") == "named"
    )
    assert all(b - a >= 14 - 0.11 for a, b in pairwise(heights))
    assert heights[0] >= 30
    # Not beyond the horizontal axis, 44 above the drawing's foot; text is centred on its place.
    assert heights[-1] <= float(root.get("viewBox").split()[3]) - 2 - 44 + 4.6


def steps(svg):
    """The corners of the first outline, in the plot's coordinates."""
    path = next(p.get("d") for p in parsed(svg).iter(f"{SVG}path") if p.get("class") == "curve")
    found = re.findall(r"H([\d.]+)V([\d.]+)", path)
    return [tuple(numbers(path)[:2]), *((float(x), float(y)) for x, y in found)]


def test_a_distribution_is_numpys_share_at_or_below():
    values = np.random.default_rng(0).exponential(1.0, 60).round(3).tolist()
    x = AxisSpec("KL", low=0.0, high=8.0)
    svg = distribution({"kept": values}, x, low=0.0, rules=[Rule("tau", 0.5, "x")], **TOLD)
    # x over 56 to 366 for 0 to 8, y over 196 to 30 for 0 to 1.
    for at, height in steps(svg):
        value, share = (at - 56) / 310 * 8, (196 - height) / 166
        # A tenth of a unit on the page is 0.003 of the axis.
        near = [np.mean(np.array(values) <= v) for v in (value - 0.003, value, value + 0.003)]
        assert min(near) - 1e-3 <= share <= max(near) + 1e-3


def luminance(colour):
    """Relative luminance of sRGB as WCAG 2 defines it."""
    parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_every_colour_can_be_read_on_both_grounds():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for light, dark in PALETTE.values():
        for ground in ("#ffffff", "#f5f6f8"):
            assert contrast(light, ground) >= 4.5
        for ground in ("#14171c", "#1d2128"):
            assert contrast(dark, ground) >= 4.5
