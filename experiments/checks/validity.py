"""Validity of the vignettes on a model, before anything is measured with them: `make probe`."""

from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.record.command import command, say, wide_console
from shl.config import FOUNDATIONS
from shl.measure.evaluation import Evaluation, nats_of
from shl.measure.validity import validity
from shl.measure.vignettes import evaluate
from shl.method.axes import load_axis
from shl.models.load import load_model


@dataclass(frozen=True)
class ProbeConfig:
    """Evaluate the vignettes on base and under both personas, and test their validity."""

    axis: str = "care_auth"
    """Axis whose personas are used, or the path of a TOML file."""
    model: str = "gemma-3-270m"
    """Embedded model, hub name, or local folder."""


def probe(config: ProbeConfig) -> None:
    """Evaluate base and both personas, and print the result."""
    axis = load_axis(config.axis)
    model = load_model(config.model)
    base, plus, minus = (evaluate(model, persona=p) for p in (None, axis.positive, axis.negative))
    show(wide_console(), config, base, plus, minus)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def show(
    console: Console, config: ProbeConfig, base: Evaluation, plus: Evaluation, minus: Evaluation
) -> None:
    """Print accuracy, confusions, split-half reliability, and the shift of each persona."""
    say(console, f"{config.model}, {base.style} style, {len(base.labels)} vignettes")
    each = [
        float((x.argmax(1) == base.intended).mean()) for x in np.swapaxes(base.log_p_each, 0, 1)
    ]
    found = validity(
        "vignettes",
        base.log_probs,
        plus.log_probs,
        minus.log_probs,
        base.labels,
        load_axis(config.axis).expected,
        calibrated=base.style == "completion",
    )
    console.print(
        f"top-1 {base.accuracy:.2f} (chance 0.14), alone {', '.join(f'{a:.2f}' for a in each)}; "
        f"informedness {found.informedness:.2f} (permutation p {found.informedness_p:.4f})"
    )
    # Base's own profile is flat by calibration, so reliability is that of the persona contrast.
    console.print(f"split-half of the persona contrast over vignettes {found.split_half:.3f}")
    columns = ("intended", *FOUNDATIONS, "recall")
    table = _table("chosen option (columns) by intended option (rows)", *columns)
    for name, row in zip(FOUNDATIONS, base.confusion, strict=True):
        recall = row[FOUNDATIONS.index(name)] / row.sum()
        noise = " noise" if name in base.noise else ""
        table.add_row(name, *map(str, row), f"{recall:.2f}{noise}")
    console.print(table)
    shifts = ("positive", "negative", "positive - negative", "95 % interval", "by stem or order")
    table = _table("shift caused by a persona prompt alone [nats]", "foundation", *shifts)
    each_plus, each_minus = (np.swapaxes(x.log_p_each, 0, 1) for x in (plus, minus))
    per = [nats_of(x) - nats_of(y) for x, y in zip(each_plus, each_minus, strict=True)]
    for k, name in enumerate(FOUNDATIONS):
        low, high = plus.shift_interval(minus, name)
        table.add_row(
            name,
            f"{plus.shift(base)[name]:+.2f}",
            f"{minus.shift(base)[name]:+.2f}",
            f"{plus.shift(minus)[name]:+.2f}",
            f"{low:+.2f} to {high:+.2f}",
            " ".join(f"{x[k]:+.2f}" for x in per),
        )
    console.print(table)
    console.print(f"{'valid' if found.valid else 'not valid'} here: {found.reason}")


def main() -> None:
    """The command line."""
    command(probe, ProbeConfig, __doc__)


if __name__ == "__main__":
    main()
