"""Pictures of a run, from its record alone: `python -m experiments.report.plots RUN`."""

import sys
from collections.abc import Sequence
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.record.reader import Event, axis_of, of_round, on_axis, read, stages
from shl.method.axes import Axis
from shl.utils.files import write_whole

mpl.use("Agg")


RED, GREEN, GREY, BLUE = "#c0392b", "#1e8449", "#555555", "#2471a3"


def trajectory(events: Sequence[Event], axis: Axis) -> Figure:
    """Trait and coherence per stage: steered red, healed green, base dashed."""
    (base,) = stages(events, "base")
    steered, healed = stages(events, "steered"), stages(events, "healed")
    names = axis.targets
    figure, panels = plt.subplots(
        len(names) + 2, 1, figsize=(7, 2.1 * (len(names) + 2)), sharex=True, layout="constrained"
    )
    for panel, name in zip(panels, names, strict=False):
        _line(panel, steered, lambda e, n=name: e["nats"][n], RED, "steered", "o")
        _line(panel, healed, lambda e, n=name: e["nats"][n], GREEN, "healed", "s")
        panel.axhline(base["nats"][name], ls="--", color=GREY, lw=1, label="base")
        for stage in stages(events, "prompted+"):
            panel.axhline(stage["nats"][name], ls=":", color=BLUE, lw=1, label="prompted +")
        sign = "up" if axis.expected[name] > 0 else "down"
        panel.set_ylabel(f"{name} [nats]\n({sign} is on-trait)")
    for panel, key, label in (
        (panels[-2], "coherence", "valid-answer mass\n/ base (log)"),
        (panels[-1], "survival", "free samples that\npass the filter"),
    ):
        _line(panel, steered, lambda e, k=key: e[k], RED, "steered", "o")
        _line(panel, healed, lambda e, k=key: e[k], GREEN, "healed", "s")
        panel.axhline(base[key], ls="--", color=GREY, lw=1, label="base")
        panel.set_ylabel(label)
    panels[-2].set_yscale("log")
    panels[-1].set_ylim(-0.05, 1.05)
    panels[-1].set_xlabel("round")
    panels[-1].set_xticks([e["round"] for e in healed])
    panels[0].legend(ncols=4, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def _line(
    panel: Axes, found: Sequence[Event], value: Any, color: str, label: str, mark: str
) -> None:
    panel.plot(
        [e["round"] for e in found],
        [value(e) for e in found],
        color=color,
        marker=mark,
        label=label,
    )


def plane(events: Sequence[Event]) -> Figure:
    """Care against authority, one point per stage and round, arrows in the order of the run."""
    figure, panel = plt.subplots(figsize=(6, 5), layout="constrained")
    order = [e for e in events if e["event"] == "stage" and not e["stage"].startswith("prompted")]
    points = [(e["nats"]["care"], e["nats"]["authority"]) for e in order]
    for (x0, y0), (x1, y1) in pairwise(points):
        panel.annotate(
            "", (x1, y1), (x0, y0), arrowprops={"arrowstyle": "->", "color": "#999999", "lw": 1}
        )
    colours = {"base": GREY, "steered": RED, "healed": GREEN}
    for e, (x, y) in zip(order, points, strict=True):
        panel.scatter(x, y, color=colours[e["stage"]], zorder=3)
        label = e["stage"] if e["round"] < 0 else f"{e['stage']} {e['round']}"
        # Rounds stand close together: names take turns on either side.
        left = e["round"] % 2 == 1
        panel.annotate(
            label,
            (x, y),
            xytext=(-5 if left else 5, 5),
            ha="right" if left else "left",
            textcoords="offset points",
            fontsize=8,
        )
    for e in events:
        if e["event"] == "stage" and e["stage"].startswith("prompted"):
            x, y = e["nats"]["care"], e["nats"]["authority"]
            panel.scatter(x, y, color=BLUE, marker="D", zorder=3)
            panel.annotate(
                e["stage"], (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8
            )
    panel.margins(0.2, 0.12)
    panel.set_xlabel("care [nats]")
    panel.set_ylabel("authority [nats]")
    return figure


def kl_tokens(events: Sequence[Event], index: int = 0) -> Figure:
    """Per-token KL to base of the completions told of a round, with tau drawn."""
    (event,) = [e for e in of_round(events, "token_kl") if e["round"] == index]
    tau = of_round(events, "healing")[index]["tau"]
    curves = event["curves"]
    figure, panels = plt.subplots(
        max(1, len(curves)),
        1,
        figsize=(9, 2.6 * max(1, len(curves))),
        layout="constrained",
        squeeze=False,
    )
    for panel, curve in zip(panels[:, 0], curves, strict=False):
        kl = curve["kl"]
        rmse = (sum(x * x for x in kl) / len(kl)) ** 0.5
        color = {"kept": BLUE, "dropped": RED, "healed": GREEN}[curve["verdict"]]
        panel.bar(range(len(kl)), kl, color=color)
        panel.axhline(tau, ls="--", color=GREY, lw=1)
        panel.set_title(
            f"{curve['verdict']} at dose {curve['dose']:.2f}: mean {sum(kl) / len(kl):.2f}, rmse "
            f"{rmse:.2f}, max {max(kl):.2f} nats; tau {tau:g} dashed",
            fontsize=9,
        )
        pieces = [repr(p)[1:-1].replace("$", r"\$") for p in curve["pieces"]]
        panel.set_xticks(range(len(kl)), pieces, rotation=90, fontsize=6)
        panel.set_ylabel("KL to base [nats]")
    return figure


def draw(folder: Path) -> list[Path]:
    """Write trajectory.png, plane.png and kl_tokens.png into the run folder."""
    _, events, _ = read(folder)
    axis = axis_of(folder)
    if not stages(events, "healed"):
        return []
    figures = {"trajectory": trajectory(events, axis), "plane": plane(events)}
    if of_round(events, "token_kl"):
        figures["kl_tokens"] = kl_tokens(events)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        picture = BytesIO()
        figure.savefig(picture, format="png", dpi=130)
        write_whole(paths[-1], picture.getvalue())
        plt.close(figure)
    return paths


__all__ = ["draw", "kl_tokens", "on_axis", "plane", "trajectory"]

if __name__ == "__main__":
    for path in draw(Path(sys.argv[1])):
        print(path)
