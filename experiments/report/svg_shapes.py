"""The pieces that charts are drawn of: colours, markers, dashes, lines and text as SVG."""

from collections.abc import Iterable

from experiments.report.escape import safe

PALETTE = {
    "grey": ("#59616b", "#a8b0bb"),
    "red": ("#b83227", "#ff8a7a"),
    "green": ("#1b7742", "#5fd08a"),
    "blue": ("#1d67a8", "#74b9ff"),
    "purple": ("#7d3c98", "#cfa4f5"),
    "orange": ("#a65300", "#ffad55"),
    "teal": ("#0b727b", "#4fd1d9"),
    "pink": ("#ad2e77", "#ff94cc"),
    "brown": ("#77502f", "#d8ae80"),
    "olive": ("#646a00", "#cfd650"),
    "indigo": ("#3c4bb0", "#a3aeff"),
    "ink": ("#1c2128", "#e6e9ee"),
}
"""Colours on a light and on a dark ground, each with a contrast of 4.5 or more there."""
MARKERS = (
    *("circle", "square", "diamond", "up", "down", "cross"),
    *("ring", "box", "rhomb", "plus", "star", "bar"),
)
DASHES = ("6 4", "2 3", "9 3 2 3", "1 5", "12 4", "4 2 1 2 1 2")
CHARACTER = 7.0
"""Width of a character at 13 units, for the legend's layout; a little more than the mean."""


def number(value: float) -> str:
    """A coordinate with one decimal; no minus before zero."""
    digits = f"{value:.1f}".removesuffix(".0")
    return "0" if digits == "-0" else digits


def line(x0: float, y0: float, x1: float, y1: float, extra: str = "") -> str:
    """A straight line; `extra` is more attributes."""
    return f'<line x1="{number(x0)}" y1="{number(y0)}" x2="{number(x1)}" y2="{number(y1)}"{extra}/>'


def text(x: float, y: float, words: str, anchor: str = "start", extra: str = "") -> str:
    """Words at a place, escaped; `extra` is more attributes."""
    return (
        f'<text x="{number(x)}" y="{number(y)}" text-anchor="{anchor}"{extra}>{safe(words)}</text>'
    )


def rect(x: float, y: float, width: float, height: float, title: str, kind: str = "fill") -> str:
    """A filled rectangle, with what it says when it is pointed at."""
    place = f'x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}"'
    return f'<rect class="{kind}" {place}><title>{safe(title)}</title></rect>'


def whisker(lines: Iterable[tuple[float, float, float, float]]) -> str:
    """An interval's line and its two caps."""
    path = "".join(f"M{number(a)} {number(b)}L{number(c)} {number(d)}" for a, b, c, d in lines)
    return f'<path class="whisker" d="{path}"/>'


def marker(shape: str, x: float, y: float, title: str = "") -> str:
    """A data point, with what it says when it is pointed at."""
    r, shut = 4.6, "fill" if shape in ("circle", "square", "diamond", "up", "down") else "open"
    within = f"<title>{safe(title)}</title>" if title else ""
    if shape in ("circle", "ring"):
        place = f'cx="{number(x)}" cy="{number(y)}" r="{number(r)}"'
        return f'<circle class="{shut}" {place}>{within}</circle>'
    corners: dict[str, list[tuple[float, float]]] = {
        "square": [(-4, -4), (4, -4), (4, 4), (-4, 4)],
        "box": [(-4, -4), (4, -4), (4, 4), (-4, 4)],
        "diamond": [(0, -6), (6, 0), (0, 6), (-6, 0)],
        "rhomb": [(0, -6), (6, 0), (0, 6), (-6, 0)],
        "up": [(0, -6), (5.5, 4), (-5.5, 4)],
        "down": [(0, 6), (5.5, -4), (-5.5, -4)],
    }
    strokes = {
        "cross": [(-4, -4, 4, 4), (-4, 4, 4, -4)],
        "plus": [(-5, 0, 5, 0), (0, -5, 0, 5)],
        "star": [(-5, 0, 5, 0), (-3, -5, 3, 5), (-3, 5, 3, -5)],
        "bar": [(0, -6, 0, 6)],
    }
    if shape in corners:
        path = "M" + "L".join(f"{number(x + a)} {number(y + b)}" for a, b in corners[shape]) + "Z"
    else:
        path = "".join(
            f"M{number(x + a)} {number(y + b)}L{number(x + c)} {number(y + d)}"
            for a, b, c, d in strokes[shape]
        )
    return f'<path class="{shut}" d="{path}">{within}</path>'
