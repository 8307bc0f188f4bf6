"""Pictures of what is inside a run; every function returns a matplotlib `Figure`.

The numbers come from `Ledger`, `logit_lens`, `token_divergence` and `dose_response`; nothing is
computed here that cannot be had without drawing. It takes matplotlib (the extra `pictures`), so
`import shl` leaves it out: `from shl import pictures`.
"""

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from shl.canvas import one_panel, released
from shl.errors import check
from shl.ledger import Ledger
from shl.response import DoseResponse
from shl.word_pictures import divergence, lens

__all__ = ["cosines", "divergence", "lens", "norms", "response"]


def cosines(ledger: Ledger, to: str = "to_first") -> Figure:
    """Heat of one cosine per layer x round; those that chance gives too are in brackets.

    Args:
        to: `to_first`, `to_previous` or `to_shift` (the internalised shift, which takes a ledger
            with a model).

    Raises:
        ShlError: another `to`, or a ledger that has no such cosine.

    Example:
        >>> from shl.axes import load_axis
        >>> from shl.config import HealConfig
        >>> from shl.lora import fresh_adapter
        >>> from shl.tiny import tiny_gemma
        >>> from shl.vector import extract_vector
        >>> model = tiny_gemma()
        >>> vector = extract_vector(model, load_axis("love"), contexts=4)
        >>> ledger = Ledger([(vector, fresh_adapter(model, HealConfig(rank=2)))])
        >>> cosines(ledger).axes[0].get_xlabel()
        'round'
    """
    names = {
        "to_first": "the first round's vector",
        "to_previous": "the previous round's vector",
        "to_shift": "the internalised shift",
    }
    check(to in names, f"to is {to!r}, it must be one of {', '.join(names)}.")
    grid = ledger.grid(to)
    check(not np.isnan(grid).all(), f"the ledger has no cosine {to!r}; the shift takes a model.")
    layers = ledger.layers
    figure, panel = one_panel(3.5 + 0.75 * grid.shape[1], 1.5 + 0.34 * len(layers))
    # What has no cosine is grey, since white is 0.
    colours = mpl.colormaps["RdBu_r"].with_extremes(bad="#cccccc")
    image = panel.imshow(
        grid, cmap=colours, vmin=-1, vmax=1, origin="lower", aspect="auto", interpolation="nearest"
    )
    nulls = False
    for entry in ledger.vectors:
        cosine = getattr(entry, to)
        if cosine is None:
            continue
        nulls = nulls or cosine.beyond_chance is not None
        inside = cosine.beyond_chance is False
        panel.text(
            entry.round,
            layers.index(entry.layer),
            (f"({cosine.value:.2f})" if inside else f"{cosine.value:.2f}")
            + ("" if cosine.random is None else f"\n{max(cosine.random, cosine.shuffled):.2f}"),
            ha="center",
            va="center",
            fontsize=7.5,
            color="white" if abs(cosine.value) > 0.6 else "black",
        )
    panel.set_xticks(range(grid.shape[1]))
    panel.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    panel.set(xlabel="round", ylabel="layer")
    panel.set_title(
        f"cosine of each round's vector to\n{names[to]}"
        + ("\n(below: 95 % of chance; brackets: within it)" if nulls else ""),
        fontsize=9,
    )
    figure.colorbar(image, ax=panel, label="cosine")
    return figure


def norms(ledger: Ledger) -> Figure:
    """Norms by layer, one line per round: the vector's own; with a model also relative to the
    residual stream, and the internalised shift's.

    Args:
        ledger: of any run.

    Example:
        >>> from shl.axes import load_axis
        >>> from shl.config import HealConfig
        >>> from shl.lora import fresh_adapter
        >>> from shl.tiny import tiny_gemma
        >>> from shl.vector import extract_vector
        >>> model = tiny_gemma()
        >>> vector = extract_vector(model, load_axis("love"), contexts=4)
        >>> ledger = Ledger([(vector, fresh_adapter(model, HealConfig(rank=2)))])
        >>> norms(ledger).axes[0].get_xlabel()
        'layer'
    """
    panels = {
        "norm": "norm of the vector\n[units of the residual stream]",
        "relative_norm": "norm of the vector /\nmean norm of the residual",
        "shift_norm": "norm of the internalised shift\n[units of the residual stream]",
    }
    shown = {key: text for key, text in panels.items() if not np.isnan(ledger.grid(key)).all()}
    figure, axes = plt.subplots(
        1, len(shown), figsize=(0.6 + 3.1 * len(shown), 3.2), layout="constrained", squeeze=False
    )
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.85, len(ledger.rounds)))
    for panel, (key, text) in zip(axes[0], shown.items(), strict=True):
        for index, values in enumerate(ledger.grid(key).T):
            panel.plot(
                ledger.layers,
                values,
                color=colours[index],
                marker="osD^vP*X"[index % 8],
                ms=4,
                label=f"round {index}",
            )
        panel.set_ylim(bottom=0)
        panel.set(xlabel="layer", ylabel=text)
        panel.set_xticks(ledger.layers[:: 1 + len(ledger.layers) // 10])
    axes[0, 0].legend(fontsize=8, frameon=False)
    return released(figure)


def response(found: DoseResponse, *, how: str = "rmse", tau: float | None = 0.5) -> Figure:
    """Dose-response: the divergence D of each dose from base, per completion (thin) and their
    median (thick).

    Args:
        how: the aggregate over tokens, as in `aggregate`.
        tau: nats, where the barrier begins (dashed), or None.

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
    figure, panel = one_panel(5.4, 3.6)
    panel.plot(doses, values, color="#999999", lw=0.8)
    panel.plot(
        doses, np.median(values, 1), color="#0072B2", lw=2.2, marker="o", ms=5, label="median"
    )
    panel.plot([], [], color="#999999", lw=0.8, label=f"each of {values.shape[1]} texts")
    if tau is not None:
        panel.axhline(tau, ls="--", lw=1, color="#D55E00", label=f"tau = {tau:g}")
    panel.set(xlabel="dose [multiples of the vector]", ylabel=f"{how} of KL to base [nats]")
    panel.set_ylim(bottom=0)
    panel.legend(fontsize=8, frameon=False)
    return figure
