"""The arms on one plane, and the three kinds of text."""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from experiments.arms.compare import LEVELS, Found, Point, spots
from experiments.arms.text_kl import HOWS, KINDS, sizes
from experiments.record.journal import Line

mpl.use("Agg")


# Okabe and Ito's palette, told apart by colour-blind readers, with a marker each.
_LOOKS = {
    "rmse": ("#009e73", "o"),
    "mean": ("#56b4e9", "s"),
    "p95": ("#0072b2", "^"),
    "none": ("#d55e00", "X"),
    "prompted": ("#cc79a7", "D"),
    "unsteered": ("#999999", "v"),
    "random": ("#e69f00", "P"),
    "steered": ("#c0392b", "*"),
    "persona": ("#000000", "h"),
}


def plane(found: Found) -> Figure:
    """Trait shift against coherence: one curve per arm, points labelled by round or dose, means
    over seeds with their range (with one seed: the trait's interval over vignettes)."""
    figure, panels = plt.subplots(1, 2, figsize=(13, 6), sharey=True, layout="constrained")
    for panel, key, name in (
        (panels[0], "mass", "valid-answer mass over base (log)"),
        (panels[1], "survival", "free samples that pass the filter, over base"),
    ):
        for arm, by_seed in found.items():
            _curve(panel, arm, [path for path in by_seed.values() if path], key)
        panel.axhline(0, color="#555555", lw=0.8)
        panel.axvline(LEVELS[0], color="#555555", lw=0.8, ls=":")
        panel.set_xlabel(name)
        panel.grid(alpha=0.2)
    panels[0].set_xscale("log")
    panels[0].set_ylabel("on-axis trait shift from base [nats]")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=9, fontsize=9)
    return figure


def _curve(panel: Axes, arm: str, paths: Sequence[Sequence[Point]], key: str) -> None:
    if not paths:
        return
    color, mark = _LOOKS.get(arm, ("#7f7f7f", "."))
    found = spots(paths, key)
    x, y = (np.array([getattr(s, name) for s in found]) for name in ("x", "trait"))

    def bars(middle: np.ndarray, ends: Sequence[tuple[float, float]]) -> np.ndarray:
        # A percentile interval may miss the estimate by a hair.
        low, high = np.array(ends).T
        return np.maximum(0, np.stack([middle - low, high - middle]))

    sideways = [s.x_interval for s in found if s.x_interval is not None]
    panel.errorbar(
        x,
        y,
        xerr=bars(x, sideways) if sideways else None,
        yerr=bars(y, [s.interval for s in found]),
        fmt=mark,
        color=color,
        # The personas are two readings of one model; any other arm is a path from base.
        ls="none" if arm == "persona" else "-",
        lw=1.3,
        elinewidth=0.7,
        capsize=2,
        label=arm,
    )
    if arm != "persona":
        panel.plot([1.0, x[0]], [0.0, y[0]], color=color, lw=0.7, ls="--")
    for spot in found:
        panel.annotate(
            spot.label,
            (spot.x, spot.trait),
            xytext=(5, 4),
            textcoords="offset points",
            fontsize=7,
            color=color,
        )


def kinds(lines: Sequence[Line], tau: float) -> Figure:
    """Distribution over texts of each aggregate of the per-token KL, by kind, with tau."""
    figure, panels = plt.subplots(1, len(HOWS), figsize=(14, 4), sharey=True, layout="constrained")
    looks: dict[str, Any] = dict(zip(KINDS, ("#0072b2", "#009e73", "#d55e00"), strict=True))
    styles = dict(zip(KINDS, ("-", "--", "-."), strict=True))
    for panel, how in zip(panels, HOWS, strict=True):
        for kind in KINDS:
            values = np.sort(sizes(lines, kind, how))
            if len(values):
                share = np.arange(1, len(values) + 1) / len(values)
                panel.step(
                    values, share, where="post", color=looks[kind], ls=styles[kind],
                    label=f"{kind} ({len(values)})",
                )  # fmt: skip
        panel.axvline(tau, color="#555555", ls=":", lw=1)
        panel.set_xscale("log")
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_xticks([0.1, 0.3, 1, 3, 10], ["0.1", "0.3", "1", "3", "10"])
        panel.set_xlabel(f"{how} of per-token KL to base [nats]")
    panels[0].set_ylabel("share of texts up to here")
    panels[0].legend(fontsize=9)
    return figure
