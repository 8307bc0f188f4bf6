"""Validity of the instruments on a model, before anything is measured with them: `make probe`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.record.command import command, say, wide_console
from shl.config import FOUNDATIONS, EvalConfig
from shl.hooks.vector import SteeringVector
from shl.measure.continuations import read_cloze, read_conflict, read_context
from shl.measure.evaluation import Evaluation, nats_of
from shl.measure.nulls import NEUTRAL, TOKENS, Divergence, nulls
from shl.measure.stats import split_half
from shl.measure.validity import validity
from shl.measure.vignettes import evaluate
from shl.measure.vignettes import vignettes as every_vignette
from shl.method.axes import Axis, load_axis
from shl.method.extract import extract_vector
from shl.models.load import load_model
from shl.utils.errors import require
from shl.utils.model import Model

ItemReading = Callable[..., np.ndarray]
"""A reading of a model as it stands, one number per item; `persona=` puts one into the prompt."""


EVERY = EvalConfig(vignettes=len(every_vignette()))
"""Reads all vignettes."""


@dataclass(frozen=True)
class ProbeConfig:
    """Test the vignettes, the use of context, and the axis's cloze against random vectors."""

    axis: str = "care_auth"
    """Axis whose personas are used, or the path of a TOML file."""
    model: str = "gemma-3-270m"
    """Embedded model, hub name, or local folder."""
    instruments: tuple[str, ...] = ()
    """cloze, vignettes, trait (need over order); default the axis's cloze, else the vignettes."""
    nulls: int = 20
    """Random vectors whose KL per token is that of the axis's vector at `dose` [count]."""
    dose: float = 0.5
    """Dose at which vectors are compared [multiples of the vector]."""


def probe(config: ProbeConfig) -> None:
    """Measure base, both personas and vectors, and print the results."""
    axis = load_axis(config.axis)
    model = load_model(config.model)
    personas = (None, axis.positive, axis.negative)
    base, plus, minus = (evaluate(model, persona=p, config=EVERY) for p in personas)
    console = wide_console()
    show(console, config, base, plus, minus)
    show_items(console, config, model, axis)


def odd_and_even(
    model: Model, read: ItemReading, vector: SteeringVector, dose: float
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


def readings(axis: Axis, names: Sequence[str]) -> dict[str, ItemReading]:
    """The instruments of these names; without names the axis's cloze, or else the vignettes.

    Raises:
        ShlError: an unknown name, or a cloze that the axis does not have.
    """
    signs = np.array([axis.expected.get(name, 0) for name in FOUNDATIONS]) / len(axis.expected)

    def vignettes(model: Model, persona: str | None = None) -> np.ndarray:
        return np.asarray(evaluate(model, persona=persona, config=EVERY).log_p @ signs)

    def trait(model: Model, persona: str | None = None) -> np.ndarray:
        return read_conflict(model, persona=persona).trait

    known: dict[str, ItemReading] = {"vignettes": vignettes, "trait": trait}
    if axis.cloze is not None:
        known = {"cloze": partial(read_cloze, cloze=axis.cloze)} | known
    chosen = names or list(known)[:1]
    for name in chosen:
        require(name in known, f"there is no instrument {name!r}, allowed: {', '.join(known)}.")
    return {name: known[name] for name in chosen}


def show_items(console: Console, config: ProbeConfig, model: Model, axis: Axis) -> None:
    """Print the use of context on base, and what personas, doses of the vector and random vectors
    of the same KL do to it and to the instruments."""
    conflict, context = read_conflict(model), read_context(model)
    right = float(((conflict.order > 0) & (conflict.need > 0)).mean())
    console.print(
        f"use of context: S {conflict.context.mean():.2f} nats over {len(conflict.order)} "
        f"conflicts, base follows order and need alone in {right:.0%}; need over order T "
        f"{conflict.trait.mean():+.2f}"
    )
    found = readings(axis, config.instruments)
    base = {name: read(model) for name, read in found.items()}
    for name, read in found.items():
        plus, minus = (read(model, persona=p) for p in (axis.positive, axis.negative))
        console.print(
            f"{name}: personas {(plus - base[name]).mean():+.2f} and "
            f"{(minus - base[name]).mean():+.2f} nats from base, {(plus - minus).mean():+.2f} "
            f"apart, with the expected sign in {(plus > minus).mean():.0%} of {len(plus)} items"
        )
    vector = extract_vector(model, axis)
    divergence = Divergence(model, NEUTRAL, tokens=TOKENS)
    columns = ("dose", "KL", *(f"{name} [nats]" for name in found), "S / base")
    table = _table("doses of the vector", *columns)
    shifts: dict[str, list[np.ndarray]] = {name: [] for name in found}
    for dose in (-1.0, -0.5, -0.25, 0.25, 0.5, 0.75, 1.0, 1.5):
        with vector.steering(model, dose):
            for name, read in found.items():
                shifts[name].append(read(model) - base[name])
            use = read_context(model).mean() / context.mean()
            kl = divergence(model).mean()
        means = (f"{shifts[name][-1].mean():+.2f}" for name in found)
        table.add_row(f"{dose:+g}", f"{kl:.2f}", *means, f"{use:.2f}")
    console.print(table)
    with vector.steering(model, config.dose):
        kl = float(divergence(model).mean())
    for name, read in found.items():
        half = split_half(np.stack(shifts[name], 1))
        console.print(f"{name}: split-half of the shift over doses {half:.2f}")
        if not config.nulls:
            continue
        odd, even = odd_and_even(model, read, vector, config.dose)

        def mean(model: Model, read: ItemReading = read) -> float:
            return float(read(model).mean())

        say(console, f"reading {config.nulls} random vectors with {name}")
        content = {"cloze": axis.cloze, "vignettes": axis.expected}.get(name)
        drawn = nulls(model, [*vector.directions], name, content, mean, count=config.nulls).at(kl)
        parts = (drawn[:, 0] - drawn[:, 1]) / 2
        limit = float(np.quantile(np.abs(parts), 0.95, method="higher"))
        console.print(
            f"at dose {config.dose:g} (KL {kl:.2f}) the vector moves {name} by {odd:+.2f} nats "
            f"(odd part; even part {even:+.2f}); {config.nulls} random vectors of the same KL by "
            f"{parts.min():+.2f} to {parts.max():+.2f}, 95 % of them by at most {limit:.2f}: "
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
