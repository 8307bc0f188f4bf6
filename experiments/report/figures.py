"""Figures: one style for all, SVG for a page and PNG for a file, and the parts of a chart.

Figures are drawn in the colours of `PALETTE` for a light ground. In the SVG each colour becomes a
CSS variable of the page, which has a second value for a dark ground. The same numbers give the
same bytes.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from experiments.report.escape import clean
from shl.utils.errors import ShlError, require
from shl.utils.files import write_whole

PALETTE = {
    "text": ("#1c2128", "#e6e9ee"),
    "line": ("#d3d8de", "#3a414b"),
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
}
"""Each colour on a light and on a dark ground; all but `line` have a contrast of at least 4.5."""
HUES = {name: light for name, (light, _) in PALETTE.items()}
MARKERS, DASHES = "osD^vXP*h<>p", ("-", "--", ":", "-.")
LARGEST = 1e12
"""Largest magnitude that is drawn; its inverse is the least on a log axis."""

styled = mpl.rc_context(
    {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "text.parse_math": False,
        "text.color": HUES["text"],
        "axes.edgecolor": HUES["grey"],
        "axes.facecolor": "none",
        "axes.labelcolor": HUES["text"],
        "axes.formatter.useoffset": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 9,
        "axes.titlelocation": "left",
        "xtick.color": HUES["text"],
        "ytick.color": HUES["text"],
        "grid.color": HUES["line"],
        "legend.frameon": False,
        "lines.linewidth": 1.6,
        "lines.markersize": 5.5,
        "figure.facecolor": "white",
        "savefig.facecolor": "white",
        "svg.fonttype": "none",
        "svg.hashsalt": "shl",
    }
)
"""Settings of every figure, while it is drawn and while it is saved."""
Look = tuple[str, str, str]
"""Colour, marker and line style of a series."""


def looks(count: int) -> list[Look]:
    """Looks of `count` series; the first 12 differ in colour and in marker."""
    names = [name for name in PALETTE if name not in ("text", "line", "grey")] + ["grey", "text"]
    return [(names[i % 12], MARKERS[i % 12], DASHES[i // 12 % 4]) for i in range(count)]


@dataclass(frozen=True)
class Chart:
    """A figure with its caption; where it cannot be drawn, the sentence that says why."""

    name: str
    caption: str
    figure: Figure | None
    problem: str = ""

    @property
    @styled
    def svg(self) -> Markup:
        """The figure as an inline SVG element that takes its colours from the page."""
        assert self.figure is not None
        stream = StringIO()
        # None leaves a field out; a date or a version would change the bytes.
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        self.figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
        body = stream.getvalue().partition("<svg")[2].partition(">")[2]
        body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
        width, height = (72 * inches for inches in self.figure.get_size_inches())
        head = (
            f'<svg class="chart" role="img" aria-labelledby="{self.name}-title {self.name}-desc" '
            f'width="{width / 0.75:.0f}" viewBox="0 0 {width:.10g} {height:.10g}">'
            f'<title id="{self.name}-title">{self.name.replace("_", " ")}</title>'
            f'<desc id="{self.name}-desc">{escape(clean(description(self.figure)))}</desc>'
        )
        # Text is escaped, so every "<" begins a tag, and only tags are changed.
        return Markup(head + re.sub(r"<[^>]+>", self._tag, body))

    def _tag(self, found: re.Match[str]) -> str:
        """A tag with ids of its figure, and variables in place of colours."""
        tag = re.sub(r'(?:xlink:)?href="#', f'href="#{self.name}-', found[0])
        tag = tag.replace(' id="', f' id="{self.name}-').replace("url(#", f"url(#{self.name}-")
        for name, light in HUES.items():
            tag = tag.replace(f": {light}", f": var(--{name})")
        return tag

    @styled
    def png(self) -> bytes:
        """The figure as a PNG file on a white ground."""
        assert self.figure is not None
        stream = BytesIO()
        self.figure.savefig(stream, format="png", dpi=130, metadata={"Software": None})
        return stream.getvalue()


def chart(name: str, caption: str, draw: Callable[[], Figure]) -> Chart:
    """The chart that `draw` gives; bad input becomes the chart's `problem`."""
    try:
        return Chart(name, caption, draw())
    except ShlError as error:
        return Chart(name, caption, None, str(error))


def write_pngs(folder: Path, charts: Iterable[Chart]) -> None:
    """Write NAME.png for every chart that could be drawn."""
    for one in charts:
        if one.figure is not None:
            write_whole(folder / f"{one.name}.png", one.png())


def description(figure: Figure) -> str:
    """Titles, series and numbers of a figure as text, for screen readers."""
    parts = []
    for panel in figure.axes:
        parts.append(f"{panel.get_title(loc='left')}, {panel.get_xlabel()}.")
        for line in panel.lines:
            # Reference lines are not in data coordinates.
            if str(line.get_label()).startswith("_") or line.get_transform() is not panel.transData:
                continue
            # Categories run downward, and their values are along x.
            found = line.get_xdata() if panel.yaxis_inverted() else line.get_ydata()
            values = np.asarray(found, dtype=float).tolist()
            listed = ", ".join(f"{v:.3g}" for v in values)
            if len(values) > 40:
                listed = f"{len(values)} points from {min(values):.3g} to {max(values):.3g}"
            parts.append(f"{line.get_label()}: {listed}.")
    return " ".join(parts)


def grid(
    count: int, columns: int, size: tuple[float, float] = (4.2, 2.1), **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels of a `size` in inches, in rows of `columns`; see `layout`."""
    columns = min(count, columns)
    rows = math.ceil(count / columns)
    figure = Figure((size[0] * columns, size[1] * rows))
    panels = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for panel in panels[count:]:
        panel.remove()
    return figure, panels[:count]


def layout(
    figure: Figure, columns: int = 6, *, left: float = 0.6, gap: float = 0.7, bottom: float = 0.5
) -> None:
    """Place the panels of a `grid`, and every name of all panels once above them.

    Margins that are given, in inches, take half the time of measuring every text.

    Args:
        columns: of the legend.
        left, gap, bottom: room for tick labels beside the first panel of a row, between panels,
            and below each.
    """
    named: dict[str, Any] = {}
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    spec = figure.axes[0].get_gridspec()
    assert spec is not None
    inner, high = figure.get_figwidth() / spec.ncols, figure.get_figheight() / spec.nrows
    title, right, legend = 0.3, 0.2, 0.1 + 0.19 * math.ceil(len(named) / columns)
    width = left + spec.ncols * inner + (spec.ncols - 1) * gap + right
    height = legend + spec.nrows * (title + high + bottom)
    figure.set_size_inches(width, height)
    figure.subplots_adjust(
        left=left / width,
        right=1 - right / width,
        top=1 - (legend + title) / height,
        bottom=bottom / height,
        wspace=gap / inner,
        hspace=(title + bottom) / high,
    )
    figure.legend(
        list(named.values()), list(named), loc="upper left", ncols=columns, fontsize=8,
        borderaxespad=0.3, borderpad=0.2, labelspacing=0.3,
    )  # fmt: skip


def finite(panel: Axes, along: Literal["x", "y"], values: Iterable[float]) -> None:
    """Raise `ShlError` for a value that an axis cannot show."""
    log = (panel.get_xscale() if along == "x" else panel.get_yscale()) == "log"
    label = panel.get_xlabel() if along == "x" else panel.get_title(loc="left")
    for value in map(float, values):
        require(
            math.isfinite(value) and abs(value) <= LARGEST and (value >= 1 / LARGEST or not log),
            f"{value:g} cannot be drawn on the {'log ' if log else ''}axis {label!r}.",
        )


def log_axis(panel: Axes, along: Literal["x", "y"], values: Sequence[float]) -> None:
    """Make an axis logarithmic where its values span more than a decade, all of them above 0."""
    if not values or min(values) <= 0 or max(values) <= 10 * min(values):
        return
    panel.set(**{f"{along}scale": "log"})
    axis = panel.xaxis if along == "x" else panel.yaxis
    wide = max(values) > 1000 * min(values)
    axis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 3.0), numticks=8))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def series(
    panel: Axes,
    x: Sequence[float],
    y: Sequence[float],
    look: Look,
    label: str,
    *,
    x_spans: Sequence[Sequence[float]] = (),
    y_spans: Sequence[Sequence[float]] = (),
) -> None:
    """A named line through points, with their intervals along either axis."""
    colour, marker, dash = HUES[look[0]], look[1], look[2]
    finite(panel, "x", [*x, *(end for span in x_spans for end in span)])
    finite(panel, "y", [*y, *(end for span in y_spans for end in span)])
    panel.plot(x, y, color=colour, marker=marker, ls=dash, label=label)
    if x_spans:
        panel.hlines(y, *np.transpose(x_spans), color=colour, lw=1)
    if y_spans:
        panel.vlines(x, *np.transpose(y_spans), color=colour, lw=1)


def point_label(panel: Axes, text: str, place: tuple[float, float], look: Look, **how: Any) -> None:
    """A label above and to the right of a point, in the colour of its series."""
    colour = HUES[look[0]]
    panel.annotate(text, place, xytext=(5, 4), textcoords="offset points", color=colour, **how)


def rule(
    panel: Axes,
    value: float,
    look: Look,
    label: str,
    *,
    along: Literal["x", "y"] = "y",
    span: Sequence[float] = (),
) -> None:
    """A named reference line at a value of an axis, with its interval as a band."""
    finite(panel, along, [value, *span])
    colour = HUES[look[0]]
    across = panel.axvline if along == "x" else panel.axhline
    across(value, color=colour, ls=look[2], lw=1.2, label=label)
    if span:
        band = panel.axvspan if along == "x" else panel.axhspan
        band(min(span), max(span), color=colour, alpha=0.1, lw=0)


def ecdf(
    panel: Axes, groups: Mapping[str, tuple[Look, Sequence[float]]], least: float, tau: float
) -> None:
    """Share of each group at or below a value, on a log axis from `least`, with tau."""
    every = [max(v, least) for _, values in groups.values() for v in values]
    finite(panel, "x", [v for _, values in groups.values() for v in values])
    log_axis(panel, "x", [*every, least])
    for name, (look, values) in groups.items():
        # `compress=True` counts only the first of equal values in matplotlib 3.11.
        panel.ecdf(np.maximum(values, least), color=HUES[look[0]], ls=look[2], label=name)
    if tau > 0:
        rule(panel, tau, ("text", "", ":"), f"tau {tau:g}", along="x")
    panel.set_xlim(left=least)
    panel.set_ylim(0, 1.02)
