"""What `make control` prints of its arms."""

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.control_arms import Arm, ControlConfig
from shl.axes import Axis
from shl.config import FOUNDATIONS
from shl.evaluation import Evaluation, nats_of
from shl.stats import bootstrap


def show(console: Console, config: ControlConfig, axis: Axis, arms: Sequence[Arm]) -> None:
    """Print what each arm did, and what it applied; 95 % intervals over texts or vignettes."""
    base = arms[0]
    done, given = Table(title="what came of it"), Table(title="what was applied, mean factor")
    for table, columns in ((done, DONE), (given, GIVEN)):
        for column in columns:
            table.add_column(column, justify="right", no_wrap=True)
    quarter = -(-config.max_new_tokens // 4)
    for arm in arms:
        kept = np.array([[float(v.kept)] for v in arm.verdicts])
        shift, (low, high) = on_axis(arm.reading, base.reading, axis)
        done.add_row(
            arm.name,
            f"{arm.applied:.2f}",
            _with(kept, ".2f"),
            f"{np.median([v.perplexity for v in arm.verdicts]):.1f}",
            f"{np.median([v.tail_perplexity for v in arm.verdicts]):.1f}",
            f"{shift:+.2f} ({low:+.2f} to {high:+.2f})",
            f"{arm.reading.coherence:.2f}",
            *(_with(arm.trait(base).reshape(-1, 2)[:, [k]], "+.2f") for k in (0, 1)),
        )
        if arm is not base:
            given.add_row(
                arm.name,
                f"{arm.nominal:.2f}",
                f"{arm.applied:.2f}",
                " ".join(f"{arm.between(k * quarter, (k + 1) * quarter):.2f}" for k in range(4)),
                " ".join(f"{x:.2f}" for x in arm.by_layer),
                " ".join(f"{x:.2f}" for x in arm.spread),
            )
    console.print(done)
    console.print(given)
    console.print("the probe reads prompts, where a decaying dose is its nominal one")


DONE = (
    "arm",
    "applied",
    "survival",
    "base ppl",
    "tail ppl",
    "on-axis nats",
    "coherence",
    "trait of kept, 1st half",
    "2nd half",
)
GIVEN = ("arm", "nominal", "applied", "by quarter of the answer", "by layer", "sd over tokens")


def _with(items: np.ndarray, form: str) -> str:
    if not len(items):
        return "none"
    low, high = bootstrap(items, lambda x: float(x.mean()))
    return f"{items.mean():{form}} ({low:{form}} to {high:{form}})"


def on_axis(reading: Evaluation, base: Evaluation, axis: Axis) -> tuple[float, tuple[float, float]]:
    """Mean expected-sign shift of the probe [nats] and its interval, paired by vignette."""
    columns = [FOUNDATIONS.index(name) for name in axis.expected]
    signs = np.array([axis.expected[name] for name in axis.expected])
    both = np.stack([reading.log_p, base.log_p], 2)[:, columns]

    def shift(items: np.ndarray) -> float:
        moved = nats_of(items[:, :, 0]) - nats_of(items[:, :, 1])
        return float((signs * moved).mean())

    return shift(both), bootstrap(both, shift)
