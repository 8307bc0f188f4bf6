"""Validity of the instruments on a model, before anything is measured with them: `make probe`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from rich.console import Console
from rich.table import Table
from transformer_lens import HookedTransformer

from experiments.record.command import command, say, wide_console
from shl.config import FOUNDATIONS
from shl.hooks.vector import SteeringVector
from shl.measure.continuations import read_cloze, read_conflict
from shl.measure.evaluation import Evaluation, nats_of
from shl.measure.nulls import random_like
from shl.measure.validity import validity
from shl.measure.vignettes import evaluate
from shl.method.axes import Axis, load_axis
from shl.method.extract import extract_vector
from shl.method.loop import MATCHED_ON
from shl.models.load import load_model

Reading = Callable[[HookedTransformer], np.ndarray]
"""A reading of a model as it stands, one number per item."""


@dataclass(frozen=True)
class ProbeConfig:
    """Test the vignettes, the use of context, and the axis's cloze against random vectors."""

    axis: str = "care_auth"
    """Axis whose personas are used, or the path of a TOML file."""
    model: str = "gemma-3-270m"
    """Embedded model, hub name, or local folder."""
    nulls: int = 20
    """Random vectors whose KL per token at `dose` is that of the axis's vector [count]."""
    dose: float = 0.5
    """Dose at which vectors are compared [multiples of the vector]."""


def probe(config: ProbeConfig) -> None:
    """Measure base, both personas and vectors, and print the results."""
    axis = load_axis(config.axis)
    model = load_model(config.model)
    base, plus, minus = (evaluate(model, persona=p) for p in (None, axis.positive, axis.negative))
    console = wide_console()
    show(console, config, base, plus, minus)
    show_items(console, config, model, axis)


def odd_and_even(
    model: HookedTransformer, read: Reading, vector: SteeringVector, dose: float
) -> tuple[float, float]:
    """Half the difference and half the sum of a reading's mean at +dose and -dose, from base's: the
    first is the trait, the second what any push does.

    Example:
        >>> import torch
        >>> from shl.models.tiny import tiny_gemma
        >>> v = SteeringVector({1: torch.ones(32)}, "tiny", "demo", 1)
        >>> odd_and_even(tiny_gemma(), lambda model: np.ones(3), v, 1.0)
        (0.0, 0.0)
    """
    at_zero = float(read(model).mean())
    with vector.steering(model, dose):
        up = float(read(model).mean()) - at_zero
    with vector.steering(model, -dose):
        down = float(read(model).mean()) - at_zero
    return (up - down) / 2, (up + down) / 2


def show_items(console: Console, config: ProbeConfig, model: HookedTransformer, axis: Axis) -> None:
    """Print the use of context on base and, if the axis has a cloze, what personas, doses of the
    vector and random vectors of the same KL do to both."""
    conflict = read_conflict(model)
    right = float(((conflict.order > 0) & (conflict.need > 0)).mean())
    console.print(
        f"use of context: S {conflict.context.mean():.2f} nats over {len(conflict.order)} "
        f"conflicts, base follows order and need alone in {right:.0%}; need over order T "
        f"{conflict.trait.mean():+.2f}"
    )
    if axis.cloze is None:
        say(console, f"axis {axis.name} has no cloze")
        return
    read = partial(read_cloze, cloze=axis.cloze)
    base, plus, minus = (read(model, persona=p) for p in (None, axis.positive, axis.negative))
    same = float((plus > minus).mean())
    console.print(
        f"cloze: personas {(plus - base).mean():+.2f} and {(minus - base).mean():+.2f} nats from "
        f"base, {(plus - minus).mean():+.2f} apart, with the expected sign in {same:.0%} of "
        f"{len(base)} openings"
    )
    vector = extract_vector(model, axis)
    table = _table("doses of the vector", "dose", "cloze [nats]", "S / base")
    for dose in (-1.0, -0.5, -0.25, 0.25, 0.5, 0.75, 1.0, 1.5):
        with vector.steering(model, dose):
            shift, use = (read(model) - base).mean(), read_conflict(model, trait=False).context
        table.add_row(f"{dose:+g}", f"{shift:+.2f}", f"{use.mean() / conflict.context.mean():.2f}")
    console.print(table)
    odd, even = odd_and_even(model, read, vector, config.dose)
    found = []
    for seed in range(config.nulls):
        prompts = axis.prompts[:MATCHED_ON]
        null = random_like(model, vector, prompts, dose=config.dose, seed=seed)
        found.append(odd_and_even(model, read, null, config.dose)[0])
        say(console, f"random vector {seed}: {found[-1]:+.2f}")
    if found:
        limit = float(np.quantile(np.abs(found), 0.95))
        console.print(
            f"at dose {config.dose:g} the vector moves the cloze by {odd:+.2f} nats (odd part; "
            f"even part {even:+.2f}); {config.nulls} random vectors of the same KL by "
            f"{min(found):+.2f} to {max(found):+.2f}, 95 % of them by at most {limit:.2f}: "
            f"{'beyond' if odd > limit else 'not beyond'} chance"
        )


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
