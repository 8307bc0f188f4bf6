"""Backtracking against plain and decaying doses at the same applied mean dose:
`python -m experiments.checks.backtracking --axis love`.

The mean dose over the tokens of the backtracked completions is that of the plain ones, and that of
the decaying ones over `max_new_tokens`. Every way answers the same prompts with the same draws. The
trait of a text is `shl.method.online.trait_scores`, under paraphrased personas.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from einops import rearrange
from rich.table import Table
from scipy.optimize import brentq

from experiments.record.command import command, say, wide_console
from experiments.record.journal import write
from shl.config import GenerateConfig
from shl.hooks.vector import SteeringVector
from shl.measure.stats import bootstrap
from shl.method.axes import Axis, load_axis
from shl.method.backtrack import Backtrack
from shl.method.extract import extract_vector
from shl.method.filters import judge
from shl.method.online import trait_scores
from shl.models.generate import Completion, generate
from shl.models.load import load_model
from shl.utils.errors import require
from shl.utils.model import Model

RESAMPLES = 10_000
COLUMNS = ("survival", "tail perplexity", "trait", "trait of survivors")
FULL = "plain, full dose"


@dataclass(frozen=True)
class BacktrackingConfig:
    """Which doses, on which model and axis."""

    axis: str = "love"
    """Built-in axis with paraphrases, or the path of a TOML file."""
    model: str = "gemma-3-270m"
    """Embedded model, hub name, or local folder."""
    doses: tuple[float, ...] = (1.5,)
    """Doses at which backtracking begins [multiples of the vector]."""
    per_prompt: int = 4
    """Completions of each way for each of the axis's prompts [count]."""
    seed: int = 42
    """Seed of the draws."""
    out: Path | None = None
    """File for the texts and their scores, as JSON lines."""
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    """Sampling."""


def backtracking(config: BacktrackingConfig) -> None:
    """Generate in every way, and print each reading and its difference to backtracking."""
    axis = load_axis(config.axis)
    require(bool(axis.paraphrases), f"axis {axis.name!r} has no paraphrases of its personas.")
    model, console = load_model(config.model), wide_console()
    vector = extract_vector(model, axis)
    lines: list[str] = []
    for dose in config.doses:
        ways = completions(model, axis, vector, dose, config)
        (ours, *_) = ways
        found = {name: scores(model, axis, texts) for name, texts in ways.items()}
        table = Table(title=f"{axis.name}, begun at dose {dose:g}, {len(ways[ours])} of each")
        for column in ("", "mean dose", *COLUMNS):
            table.add_column(column)
        same = applied(ways[ours])
        for name, values in found.items():
            mean = dose if name == FULL else same
            table.add_row(name, f"{mean:.2f}", *cells(values, len(axis.prompts)))
            if name != ours:
                differences = cells(found[ours], len(axis.prompts), values)
                table.add_row(f"{ours} less {name}", "", *differences)
        console.print(table)
        rewound = sum(len(c.rewinds) for c in ways[ours])
        say(console, f"{rewound} rewinds in {len(ways[ours])} completions")
        lines += [
            json.dumps(
                {"way": name, "begun": dose, "prompt": c.prompt.text, "text": c.text}
                | dict(zip(("kept", "log tail perplexity", "trait"), row, strict=True))
            )
            for name, texts in ways.items()
            for c, row in zip(texts, found[name].tolist(), strict=True)
        ]
    if config.out:
        write(config.out, "\n".join(lines) + "\n")


def completions(
    model: Model, axis: Axis, vector: SteeringVector, dose: float, config: BacktrackingConfig
) -> dict[str, list[Completion]]:
    """Completions of every way, backtracking first."""
    prompts = [text for text in axis.prompts for _ in range(config.per_prompt)]
    sampling = vars(config.generate) | {"seed": config.seed}

    def made(
        start: float, *, half_life: float | None = None, backtrack: Backtrack | None = None
    ) -> list[Completion]:
        with vector.steering(model, start, half_life=half_life):
            return generate(model, prompts, **sampling, backtrack=backtrack)

    ours = made(dose, backtrack=Backtrack())
    mean, most = applied(ours), config.generate.max_new_tokens
    require(mean < dose, f"nothing was rewound from dose {dose:g}, so there is nothing to compare.")
    return {
        "backtracking": ours,
        "plain, same mean dose": made(mean),
        "decaying, same mean dose": made(dose, half_life=half_life(mean / dose, most)),
        FULL: made(dose),
    }


def half_life(share: float, tokens: int) -> float:
    """The half-life at which the mean of 0.5 ** (t / half_life) over `tokens` tokens is `share`.

    Example:
        >>> round(half_life(0.75, 2), 3)  # (1 + 1/2) / 2
        1.0
    """
    t = np.arange(tokens)
    return float(brentq(lambda h: float((0.5 ** (t / h)).mean()) - share, 1e-3, 1e6))


def applied(texts: Sequence[Completion]) -> float:
    """Mean dose over the tokens of completions."""
    doses = [x for c in texts for x in (c.doses or (c.dose,) * len(c.tokens))]
    return float(np.mean(doses))


def scores(model: Model, axis: Axis, texts: Sequence[Completion]) -> np.ndarray:
    """Kept, log tail perplexity under base, and trait of each completion, `[completion, 3]`; the
    trait is the mean over the paraphrases."""
    verdicts = judge(model, texts)
    traits = np.mean([trait_scores(model, texts, pair) for pair in axis.paraphrases], axis=0)
    # A completion without tokens has no perplexity; it is dropped.
    tails = np.log([v.tail_perplexity if v.completion.tokens else 1.0 for v in verdicts])
    return np.stack([[float(v.kept) for v in verdicts], tails, traits], 1)


def cells(ours: np.ndarray, prompts: int, others: np.ndarray | None = None) -> list[str]:
    """Each reading, or its difference, with its 95 % interval over resampled prompts, each with all
    of its completions; `ours` and `others` are `[completion, 3]` by prompt."""
    pairs = np.stack([ours, np.zeros_like(ours) if others is None else others], 1)
    by_prompt = rearrange(pairs, "(prompt n) way value -> prompt n way value", prompt=prompts)
    found = []
    for of in (_survival, _tail, _trait, _survivors_trait):

        def difference(x: np.ndarray, of: Callable[[np.ndarray], float] = of) -> float:
            first, second = rearrange(x, "prompt n way value -> way (prompt n) value")
            return of(first) - (0.0 if others is None else of(second))

        low, high = bootstrap(by_prompt, difference, resamples=RESAMPLES)
        sign = "" if others is None else "+"
        found.append(f"{difference(by_prompt):{sign}.2f} ({low:{sign}.2f} to {high:{sign}.2f})")
    return found


def _survival(x: np.ndarray) -> float:
    return float(x[:, 0].mean())


def _tail(x: np.ndarray) -> float:
    return float(np.exp(np.median(x[:, 1])))


def _trait(x: np.ndarray) -> float:
    return float(x[:, 2].mean())


def _survivors_trait(x: np.ndarray) -> float:
    kept = x[x[:, 0] == 1]
    return float(kept[:, 2].mean()) if len(kept) else float("nan")


def main() -> None:
    """The command line."""
    command(backtracking, BacktrackingConfig, __doc__)


if __name__ == "__main__":
    main()
