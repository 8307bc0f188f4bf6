"""Figures of a run's vectors, adapters and texts, each a matplotlib `Figure`.

The module needs matplotlib (the extra `pictures`), so it is imported by `from shl import pictures`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle

from shl.analysis.dose_response import DoseResponse, require_tokens
from shl.analysis.ledger import Ledger
from shl.analysis.logit_lens import largest_by_chance, logit_lens
from shl.analysis.weight_updates import NULL_COVERAGE
from shl.models.generate import Completion
from shl.models.scores import token_divergence
from shl.models.tokens import decode
from shl.utils.errors import require
from shl.utils.model import Model
from shl.utils.shapes import Direction

__all__ = ["cosines", "divergence", "lens", "norms", "response"]

FONT = FontProperties(family="DejaVu Sans", size=7)
MONO = FontProperties(family="DejaVu Sans Mono", size=8)
"""Shipped with matplotlib; a character that they lack is drawn as an empty square."""
Colour = tuple[float, float, float, float]
"""Red, green, blue and opacity, 0 to 1."""
COLUMNS = 92
"""Characters in a line of drawn text."""


def subplots(
    rows: int, columns: int, width: float, height: float, **grid: Any
) -> tuple[Figure, np.ndarray]:
    """`plt.subplots` in inches; closed in pyplot, as a notebook would display it a second time."""
    figure, panels = plt.subplots(
        rows, columns, figsize=(width, height), layout="constrained", squeeze=False, **grid
    )
    plt.close(figure)
    return figure, panels


def cell(
    panel: Axes, x: float, y: float, width: float, text: str, colour: Colour, font: FontProperties
) -> None:
    """A coloured box of height 1 with centred text in black or white."""
    panel.add_patch(Rectangle((x, y), width, 1, color=colour, lw=0))
    red, green, blue, _ = colour
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
    one_line = "\n" not in text  # single lines, side by side, share a baseline
    panel.text(
        x + width / 2,
        y + (0.68 if one_line else 0.5),
        text,
        ha="center",
        va="baseline" if one_line else "center",
        fontproperties=font,
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
    glyphs = get_font(findfont(font))
    return "".join(
        c if c.isprintable() and glyphs.get_char_index(ord(c)) else "\u25a1" for c in text
    )


def lens(
    model: Model,
    directions: Mapping[int, Direction] | Mapping[str, Direction],
    k: int = 5,
    *,
    keep: Callable[[str], bool] | None = None,
) -> Figure:
    """Logit lens: the `k` tokens that each direction raises and lowers most, with their scores.

    Args:
        directions: `vector.directions`, or `strongest_directions(model, adapter)` of dW, whose
            signs are arbitrary.
        keep: filter on a token's text (`str.isascii`); None keeps all tokens.

    Raises:
        ShlError: no direction, or one of zero or not finite.

    Example:
        >>> import shl
        >>> model = shl.tiny.tiny_gemma()
        >>> vector = shl.extract_vector(model, shl.load_axis("love"), contexts=4)
        >>> figure = lens(model, vector.directions, keep=str.isalpha)
    """
    require(len(directions) > 0, "there are no directions to draw, give at least one.")
    rows = [logit_lens(model, v, k, keep=keep) for v in directions.values()]
    labels = [f"layer {key}" if isinstance(key, int) else key for key in directions]
    chance = largest_by_chance(model.cfg.d_vocab)
    norm = Normalize(-2.2 * chance, 2.2 * chance)  # scores within chance are pale
    figure, [[panel]] = subplots(1, 1, 1.4 + 1.12 * 2 * k, 1.1 + 0.36 * len(rows))
    colours = mpl.colormaps["PuOr_r"]
    for y, row in enumerate(rows):
        for side, tokens in enumerate((row.raised, row.lowered)):
            for i, (token, z) in enumerate(tokens):
                x = side * (k + 0.25) + i
                text = drawable(token.replace(" ", "\u00b7"), FONT)
                text = text if len(text) <= 14 else text[:13] + "\u2026"
                cell(panel, x, y, 1.0, f"{text}\n{z:+.1f}", colours(norm(z)), FONT)
    panel.set(xlim=(0, 2 * k + 0.25), ylim=(len(rows), 0))
    panel.set_yticks(np.arange(len(rows)) + 0.5, labels, fontsize=8)
    panel.set_xticks([k / 2, k + 0.25 + k / 2], ["raised", "lowered"])
    panel.tick_params(length=0, labeltop=True, labelbottom=False)
    panel.spines[:].set_visible(False)
    panel.set_xlabel(
        "standard deviations from the vocabulary's mean; the largest of as many random scores is "
        f"about {chance:.1f}",
        fontsize=8,
    )
    return figure


def divergence(model: Model, completions: Sequence[Completion], *, tau: float = 0.5) -> Figure:
    """Per-token KL(model || base) over the text of each completion, with the hooks that are on.

    Args:
        tau: nats; the titles give the share of tokens above it.

    Raises:
        ShlError: no completion, or one without tokens.

    Example:
        >>> import shl
        >>> model = shl.tiny.tiny_gemma()
        >>> vector = shl.extract_vector(model, shl.load_axis("love"), contexts=4)
        >>> texts = shl.generate(model, ["Hello?"], max_new_tokens=4, min_new_tokens=4)
        >>> with vector.steering(model, 0.7):
        ...     figure = divergence(model, texts)
    """
    require_tokens(completions)
    values = [token_divergence(model, completion).numpy() for completion in completions]
    norm = PowerNorm(0.5, 0, max(float(kl.max()) for kl in values) or 1.0)
    colours = mpl.colormaps["YlOrBr"]
    placed = [wrapped([decode(model, [t]) for t in c.tokens]) for c in completions]
    heights = [1 + max(line for line, _, _ in tokens) for tokens in placed]
    height = sum(0.24 * h + 0.35 for h in heights) + 0.2
    figure, axes = subplots(len(placed), 1, 8.6, height, height_ratios=heights)
    for panel, tokens, kl, height in zip(axes[:, 0], placed, values, heights, strict=True):
        for (line, column, text), value in zip(tokens, kl, strict=True):
            cell(panel, column, line, len(text), text, colours(norm(value)), MONO)
        panel.set(xlim=(0, COLUMNS), ylim=(height, 0), xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
        panel.set_title(
            f"mean {kl.mean():.2f}, rmse {(kl**2).mean() ** 0.5:.2f}, max {kl.max():.2f} nats; "
            f"{(kl > tau).mean():.0%} of {len(kl)} tokens above {tau:g}",
            fontsize=8,
            loc="left",
        )
    scale = mpl.cm.ScalarMappable(norm, colours)
    figure.colorbar(scale, ax=list(axes[:, 0]), label="KL to base [nats]", pad=0.01, aspect=12)
    return figure


def cosines(ledger: Ledger, to: str = "to_first") -> Figure:
    """Heat map of a cosine per layer and round; those within chance are in brackets.

    Args:
        to: `to_first`, `to_previous` or `to_shift` (the internalised shift, which takes a ledger
            with a model).

    Raises:
        ShlError: another `to`, or a ledger that has no such cosine.

    Example:
        >>> import shl
        >>> model = shl.tiny.tiny_gemma()
        >>> vector = shl.extract_vector(model, shl.load_axis("love"), contexts=4)
        >>> adapter = shl.hooks.adapter.fresh_adapter(model, shl.HealConfig(rank=2))
        >>> cosines(Ledger([(vector, adapter)])).axes[0].get_xlabel()
        'round'
    """
    names = {
        "to_first": "the first round's vector",
        "to_previous": "the previous round's vector",
        "to_shift": "the internalised shift",
    }
    require(to in names, f"to is {to!r}, it must be one of {', '.join(names)}.")
    grid = ledger.grid(to)
    require(not np.isnan(grid).all(), f"the ledger has no cosine {to!r}; the shift takes a model.")
    layers = ledger.layers
    figure, [[panel]] = subplots(1, 1, 3.5 + 0.75 * grid.shape[1], 1.5 + 0.34 * len(layers))
    # A missing cosine is grey, since white is 0.
    colours = mpl.colormaps["RdBu_r"].with_extremes(bad="#cccccc")
    image = panel.imshow(
        grid, cmap=colours, vmin=-1, vmax=1, origin="lower", aspect="auto", interpolation="nearest"
    )
    note = ""
    for entry in ledger.vectors:
        cosine = getattr(entry, to)
        if cosine is None:
            continue
        text = f"({cosine.value:.2f})" if cosine.beyond_chance is False else f"{cosine.value:.2f}"
        if cosine.random is not None:
            text += f"\n{max(cosine.random, cosine.shuffled):.2f}"
            note = f"\n(below: {NULL_COVERAGE:.0%} of chance; brackets: within it)"
        style = {"color": "white" if abs(cosine.value) > 0.6 else "black", "fontsize": 7.5}
        place = (entry.round, layers.index(entry.layer))
        panel.text(*place, text, ha="center", va="center", **style)
    panel.set_xticks(range(grid.shape[1]))
    panel.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    panel.set(xlabel="round", ylabel="layer")
    panel.set_title(f"cosine of each round's vector to\n{names[to]}{note}", fontsize=9)
    figure.colorbar(image, ax=panel, label="cosine")
    return figure


def norms(ledger: Ledger) -> Figure:
    """Norms by layer, one line per round: of the vector, with a model also relative to the
    residual stream, and of the internalised shift.

    Example:
        >>> import shl
        >>> model = shl.tiny.tiny_gemma()
        >>> vector = shl.extract_vector(model, shl.load_axis("love"), contexts=4)
        >>> adapter = shl.hooks.adapter.fresh_adapter(model, shl.HealConfig(rank=2))
        >>> norms(Ledger([(vector, adapter)])).axes[0].get_xlabel()
        'layer'
    """
    panels = {
        "norm": "norm of the vector\n[units of the residual stream]",
        "relative_norm": "norm of the vector /\nmean norm of the residual",
        "shift_norm": "norm of the internalised shift\n[units of the residual stream]",
    }
    present = {key: text for key, text in panels.items() if not np.isnan(ledger.grid(key)).all()}
    figure, axes = subplots(1, len(present), 0.6 + 3.1 * len(present), 3.2)
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.85, len(ledger.rounds)))
    for panel, (key, text) in zip(axes[0], present.items(), strict=True):
        for index, values in enumerate(ledger.grid(key).T):
            style = {"color": colours[index], "marker": "osD^vP*X"[index % 8], "ms": 4}
            panel.plot(ledger.layers, values, label=f"round {index}", **style)
        panel.set_ylim(bottom=0)
        panel.set(xlabel="layer", ylabel=text)
        panel.set_xticks(ledger.layers[:: 1 + len(ledger.layers) // 10])
    axes[0, 0].legend(fontsize=8, frameon=False)
    return figure


def response(found: DoseResponse, *, how: str = "rmse", tau: float | None = 0.5) -> Figure:
    """Dose-response: the divergence D of each dose from base, per completion (thin) and their
    median (thick).

    Args:
        how: the aggregate over tokens, as in `aggregate`.
        tau: nats, the barrier (dashed), or None.

    Raises:
        ShlError: an unknown aggregate.

    Example:
        >>> import torch
        >>> kl = tuple((torch.full((3,), dose**2),) for dose in (0.0, 0.5, 1.0))
        >>> response(DoseResponse((0.0, 0.5, 1.0), kl)).axes[0].get_ylabel()
        'rmse of KL to base [nats]'
    """
    order = np.argsort(found.doses)
    doses, values = np.array(found.doses)[order], found.divergence(how).numpy()[order]
    median = np.median(values, 1)
    figure, [[panel]] = subplots(1, 1, 5.4, 3.6)
    panel.plot(doses, values, color="#999999", lw=0.8)
    panel.plot(doses, median, color="#0072B2", lw=2.2, marker="o", ms=5, label="median")
    panel.plot([], [], color="#999999", lw=0.8, label=f"each of {values.shape[1]} texts")
    if tau is not None:
        panel.axhline(tau, ls="--", lw=1, color="#D55E00", label=f"tau = {tau:g}")
    panel.set(xlabel="dose [multiples of the vector]", ylabel=f"{how} of KL to base [nats]")
    panel.set_ylim(bottom=0)
    panel.legend(fontsize=8, frameon=False)
    return figure
