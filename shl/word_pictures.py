"""Pictures with words in them: the logit lens, and the divergence over a text."""

from collections.abc import Callable, Mapping, Sequence

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from transformer_lens import HookedTransformer

from shl.canvas import COLUMNS, FONT, MONO, cell, drawable, one_panel, released, wrapped
from shl.errors import check
from shl.generate import Completion
from shl.lens import largest_by_chance, logit_lens
from shl.scores import token_divergence
from shl.shapes import Direction
from shl.tokens import decode


def lens(
    model: HookedTransformer,
    directions: Mapping[int, Direction] | Mapping[str, Direction],
    k: int = 5,
    *,
    keep: Callable[[str], bool] | None = None,
) -> Figure:
    """Logit lens: the `k` words that each direction raises and lowers most, with their scores.

    Args:
        directions: `vector.directions`, or `strongest_directions(model, adapter)` of dW, whose
            two sides may be swapped.
        keep: which words may be listed, given their text (`str.isascii`); None is all of them.

    Raises:
        ShlError: no direction, or one that has no words.

    Example:
        >>> from shl.axes import load_axis
        >>> from shl.tiny import tiny_gemma
        >>> from shl.vector import extract_vector
        >>> model = tiny_gemma()
        >>> vector = extract_vector(model, load_axis("love"), contexts=4)
        >>> figure = lens(model, vector.directions, keep=str.isalpha)
    """
    check(len(directions) > 0, "there are no directions to look through, give at least one.")
    rows = [logit_lens(model, v, k, keep=keep) for v in directions.values()]
    labels = [f"layer {key}" if isinstance(key, int) else key for key in directions]
    chance = largest_by_chance(model.cfg.d_vocab)
    # Scores that chance reaches are pale.
    norm = Normalize(-2.2 * chance, 2.2 * chance)
    figure, panel = one_panel(1.4 + 1.12 * 2 * k, 1.1 + 0.36 * len(rows))
    colours = mpl.colormaps["PuOr_r"]
    for y, row in enumerate(rows):
        for side, words in enumerate((row.raised, row.lowered)):
            for i, (word, z) in enumerate(words):
                x = side * (k + 0.25) + i
                text = drawable(word.replace(" ", "\u00b7"), FONT)
                text = text if len(text) <= 14 else text[:13] + "\u2026"
                cell(panel, x, y, 1.0, f"{text}\n{z:+.1f}", colours(norm(z)), FONT, 7)
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


def divergence(
    model: HookedTransformer, completions: Sequence[Completion], *, tau: float = 0.5
) -> Figure:
    """Per-token KL(model as it stands || base) over the text of each completion.

    Call it under the hooks that are to be seen (a steering vector, adapters).

    Args:
        tau: nats, from which a token counts as above the barrier in the titles.

    Raises:
        ShlError: no completion, or one without tokens.

    Example:
        >>> from shl.axes import load_axis
        >>> from shl.generate import generate
        >>> from shl.tiny import tiny_gemma
        >>> from shl.vector import extract_vector
        >>> model = tiny_gemma()
        >>> vector = extract_vector(model, load_axis("love"), contexts=4)
        >>> texts = generate(model, ["Hello?"], max_new_tokens=4, min_new_tokens=4)
        >>> with vector.steering(model, 0.7):
        ...     figure = divergence(model, texts)
    """
    check(len(completions) > 0, "there are no completions to draw, give at least one.")
    for completion in completions:
        check(len(completion.tokens) > 0, "a completion without tokens has no divergence.")
    values = [token_divergence(model, completion).numpy() for completion in completions]
    norm = PowerNorm(0.5, 0, max(float(kl.max()) for kl in values) or 1.0)
    colours = mpl.colormaps["YlOrBr"]
    placed = [wrapped([decode(model, [t]) for t in c.tokens]) for c in completions]
    heights = [1 + max(line for line, _, _ in words) for words in placed]
    figure, axes = plt.subplots(
        len(placed),
        1,
        figsize=(8.6, sum(0.24 * h + 0.35 for h in heights) + 0.2),
        height_ratios=heights,
        layout="constrained",
        squeeze=False,
    )
    for panel, words, kl, height in zip(axes[:, 0], placed, values, heights, strict=True):
        for (line, column, text), value in zip(words, kl, strict=True):
            cell(panel, column, line, len(text), text, colours(norm(value)), MONO, 8)
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
    return released(figure)
