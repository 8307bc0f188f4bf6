"""What `shl.pictures` draws with: panels, coloured cells, and text that the font has."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle

FONT, MONO = FontProperties("DejaVu Sans"), FontProperties("DejaVu Sans Mono")
"""Shipped with matplotlib; what they cannot draw becomes an empty square."""
COLUMNS = 92
"""Characters in a line of drawn text."""


def one_panel(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure with a single panel, in inches."""
    figure, panel = plt.subplots(figsize=(width, height), layout="constrained")
    return released(figure), panel


def released(figure: Figure) -> Figure:
    """Out of pyplot's list, or a notebook would show the figure a second time."""
    plt.close(figure)
    return figure


def cell(
    panel: Axes,
    x: float,
    y: float,
    width: float,
    text: str,
    colour: tuple[float, ...],
    font: FontProperties,
    size: float,
) -> None:
    """A coloured box, one line high, with its text in the middle in black or white."""
    panel.add_patch(Rectangle((x, y), width, 1, color=colour, lw=0))
    red, green, blue, _ = colour
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
    one_line = "\n" not in text  # those stand on one baseline, side by side
    panel.text(
        x + width / 2,
        y + (0.68 if one_line else 0.5),
        text,
        ha="center",
        va="baseline" if one_line else "center",
        fontproperties=font,
        fontsize=size,
        color="white" if dark else "black",
        linespacing=0.95,
        parse_math=False,
    )


def wrapped(pieces: Sequence[str]) -> list[tuple[int, int, str]]:
    """(line, column, drawable text) of each token, broken between tokens.

    Example:
        >>> wrapped(["a" * 90, " b", "\\n", "c"])[1:]
        [(0, 90, ' b'), (1, 0, '↵'), (1, 1, 'c')]
    """
    out, line, column = [], 0, 0
    for piece in pieces:
        text = drawable(piece.replace("\n", "\u21b5").replace("\t", "\u2192"), MONO)[:COLUMNS]
        if column + len(text) > COLUMNS:
            line, column = line + 1, 0
        out.append((line, column, text))
        column += len(text)
    return out


def drawable(text: str, font: FontProperties) -> str:
    """The text, with an empty square for every character that the font lacks.

    Example:
        >>> drawable("café 希", FONT)
        'café □'
    """
    own = get_font(findfont(font))
    return "".join(c if c.isprintable() and own.get_char_index(ord(c)) else "\u25a1" for c in text)
