"""Log-probabilities of short continuations, and two instruments that are read from them.

*Cloze*: openings such as "My neighbour is", continued by words of either pole of an axis.
*Conflict*: an order and a need that ask for opposite actions; how much the text before it decides
which action follows. Items are crossed: each action is the ordered one once and the needed one
once, in both sentence orders, so that what a model likes about a wording cancels exactly.
"""

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import logsumexp
from torch import Tensor

from shl.fast import KVCache
from shl.hooks.handle import unhooked
from shl.hooks.sites import final_hidden, readout
from shl.kl import log_probs_at
from shl.measure.nulls import NEUTRAL, TOKENS, Divergence
from shl.models.generate import prefill, run
from shl.models.nan_checks import require_finite
from shl.models.tokens import Prompt, encode, encode_text, is_chat, length_batches
from shl.utils.errors import in_batches, require
from shl.utils.files import DATA
from shl.utils.model import Model

Instrument = Callable[[Model, str | None], Mapping[str, Any]]
"""Called with the model, its hooks on, and the persona in the prompt or None."""

CELLS = (
    ("order", 0, None),
    ("order", 1, None),
    ("need", 0, None),
    ("need", 1, None),
    ("order", 0, "need"),
    ("order", 1, "need"),
    ("need", 0, "order"),
    ("need", 1, "order"),
)
"""What is said first, the action that it asks for, and what is said then, of the other action."""


@torch.no_grad()
def option_scores(
    model: Model,
    prefixes: Sequence[Sequence[int]],
    options: Sequence[Sequence[Sequence[int]]],
    *,
    batch_size: int = 32,
    group: int = 1,
    relative: bool = False,
) -> np.ndarray:
    """Log-probability of each option after its prefix, `[prefix, option]`, in nats.

    Options are scored whole, as sums over their tokens. A prefix is run once, and its options
    continue its cache.

    Args:
        prefixes: token ids.
        options: for each prefix the same number of options, token ids.
        group: every `group` consecutive prefixes begin with the same tokens, which are run once.
        relative: only differences between the options of a prefix matter, of which there are two or
            more; a constant is left out.

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> scores = option_scores(tiny_gemma(), [[2, 9]], [[[5], [6, 7]]])
        >>> scores.shape
        (1, 2)
    """
    parts = []

    def work(groups: list[int]) -> None:
        rows = [i for number in groups for i in range(number * group, (number + 1) * group)]
        chosen = [options[i] for i in rows]
        longest = max(len(option) for row in chosen for option in row)
        last, start = prefill(model, [prefixes[i] for i in rows], reserve=longest - 1, group=group)
        part = predictions(model, last[:, 0], start, chosen)
        parts.append(part.of_rows(rows))

    lengths = [max(map(len, prefixes[i : i + group])) for i in range(0, len(prefixes), group)]
    in_batches(length_batches(lengths, max(batch_size // group, 1)), work, "continuations")
    return score(model, parts, prefixes, "a continuation's score", relative=relative)


@dataclass(frozen=True, eq=False)
class Predictions:
    """Where the tokens of options are predicted.

    `hidden` is `[position, d_model]`, input of the unembedding; `tokens` is `[position, option]`,
    the next token of each option or -1; `row` is `[position]`, the text that the options continue.
    """

    hidden: Tensor
    tokens: Tensor
    row: Tensor

    def of_rows(self, numbers: Sequence[int]) -> "Predictions":
        """The same for texts with other numbers."""
        return replace(self, row=torch.tensor(numbers, device=self.row.device)[self.row])


def predictions(
    model: Model, last: Tensor, start: KVCache, options: Sequence[Sequence[Sequence[int]]]
) -> Predictions:
    """Run options after cached texts.

    Args:
        last: final residuals of the last tokens, `[row, d_model]`.
        start: the cache of the texts, which is not changed.
        options: for each row the same number of options, token ids.
    """
    count, longest = len(options[0]), max(len(option) for row in options for option in row)
    padded = [[[*option, *[-1] * (longest - len(option))] for option in row] for row in options]
    ids = torch.tensor(padded, device=last.device)
    row = torch.arange(len(options), device=last.device)
    parts = [(last, ids[..., 0], row)]
    if longest > 1:
        # Every token of an option but the last is run, to predict the token after it. Padding on
        # the right of a token does not change it, so that it needs no mask.
        tokens, after = ids[..., :-1].clamp(min=0).flatten(0, 1), ids[..., 1:]
        kv = start.rows(row.repeat_interleave(count), start.length + longest - 1)
        residual = run(model, tokens, torch.ones_like(tokens), kv)
        real = after >= 0
        row, option, _ = real.nonzero(as_tuple=True)
        only = F.one_hot(option, count).bool()
        residual = residual.view(*after.shape, -1)[real]
        parts.append((residual, torch.where(only, after[real][:, None], -1), row))
    residual, tokens, row = map(torch.cat, zip(*parts, strict=True))
    return Predictions(final_hidden(model, residual), tokens, row)


def score(
    model: Model,
    parts: Sequence[Predictions],
    texts: Sequence[Sequence[int]],
    what: str,
    *,
    relative: bool = False,
) -> np.ndarray:
    """`[text, option]`: log-probability of each option, in nats, with one sweep of the unembedding.

    Args:
        texts: token ids, for the message if a score is not finite.
        what: a singular noun phrase for that message.
        relative: as in `option_scores`.
    """
    hidden = torch.cat([part.hidden for part in parts])
    tokens = torch.cat([part.tokens for part in parts])
    row = torch.cat([part.row for part in parts])
    # All options have a first token, predicted at one position.
    first = (tokens >= 0).all(1) if relative else None
    found = log_probs_at(hidden, model.W_U, tokens.clamp(min=0), relative=first, **readout(model))
    scores = found.new_zeros(len(texts), tokens.shape[1])
    scores.index_add_(0, row, found.masked_fill(tokens < 0, 0.0))
    wrong = (~torch.isfinite(scores)).any(1).nonzero()[:, 0].tolist()
    require_finite(scores, what, model, lambda: [list(texts[i]) for i in wrong])
    return scores.double().cpu().numpy()


@dataclass(frozen=True)
class Cloze:
    """Openings, and words of the positive and of the negative pole that may continue them.

    Raises:
        ShlError: a list is empty, or a text is empty or repeated.
    """

    openings: tuple[str, ...]
    positive: tuple[str, ...]
    negative: tuple[str, ...]

    def __post_init__(self) -> None:
        require(len(self.openings) > 0, "a cloze has no openings, it needs at least one.")
        for name in ("positive", "negative"):
            require(len(getattr(self, name)) > 0, f"a cloze has no {name} words.")
        for texts in (self.openings, (*self.positive, *self.negative)):
            wrong = [text for text in texts if not text.strip() or texts.count(text) > 1]
            require(not wrong, f"a cloze has {wrong[:1]}, which is empty or repeated.")


def read_cloze(
    model: Model, cloze: Cloze, *, persona: str | None = None, batch_size: int = 32
) -> np.ndarray:
    """Log-odds of the positive against the negative words after each opening, `[opening]`, nats.

    A chat model reads the opening as the beginning of its answer to "Tell me something."
    """
    prefixes = [
        _answer(model, "Tell me something.", opening, persona)
        if is_chat(model)
        else _plain(model, opening, persona)
        for opening in cloze.openings
    ]
    words = [encode_text(model, f" {word}") for word in (*cloze.positive, *cloze.negative)]
    options = [words] * len(prefixes)
    scores = option_scores(model, prefixes, options, batch_size=batch_size, relative=True)
    n = len(cloze.positive)
    return np.asarray(logsumexp(scores[:, :n], axis=1) - logsumexp(scores[:, n:], axis=1))


@dataclass(frozen=True)
class ConflictItem:
    """Who orders, who acts, who needs, and two actions as infinitives and in the past tense."""

    by: str
    name: str
    whose: str
    actions: tuple[str, str]
    past: tuple[str, str]

    def text(self, cell: tuple[str, int, str | None]) -> str:
        """The sentences of a cell (see `CELLS`)."""
        first, action, second = cell
        verbs = {"order": f"{self.by} told", "need": f"{self.whose} badly needed"}
        said = [f"{verbs[first]} {self.name} to {self.actions[action]}."]
        if second is not None:
            said.append(f"{verbs[second]} {self.name} to {self.actions[1 - action]}.")
        return " ".join(said)


@cache
def conflict_items() -> tuple[ConflictItem, ...]:
    """The built-in items.

    Example:
        >>> len(conflict_items())
        40
    """
    table = tomllib.loads((DATA / "conflict.toml").read_text("utf-8"))
    return tuple(
        ConflictItem(e["by"], e["name"], e["whose"], tuple(e["actions"]), tuple(e["past"]))
        for e in table["item"]
    )


@dataclass(frozen=True, eq=False)
class Conflict:
    """A reading: `odds` is `[item, cell]`, log-odds of action 0 against action 1, in nats."""

    odds: np.ndarray

    @property
    def order(self) -> np.ndarray:
        """`[item]`: how much an order alone raises the ordered action, nats."""
        return (self.odds[:, 0] - self.odds[:, 1]) / 2

    @property
    def need(self) -> np.ndarray:
        """`[item]`: how much a need alone raises the needed action, nats."""
        return (self.odds[:, 2] - self.odds[:, 3]) / 2

    @property
    def context(self) -> np.ndarray:
        """`[item]`: S, how much the text before it decides, nats; a measure of coherence."""
        return self.order + self.need

    @property
    def trait(self) -> np.ndarray:
        """`[item]`: T, how much the need prevails over a contrary order, nats."""
        order_first = self.odds[:, 5] - self.odds[:, 4]
        need_first = self.odds[:, 6] - self.odds[:, 7]
        return (order_first + need_first) / 4


def read_conflict(
    model: Model,
    items: Sequence[ConflictItem] | None = None,
    *,
    persona: str | None = None,
    batch_size: int = 32,
) -> Conflict:
    """Read every cell of the crossed conflicts; every other item is a narrative, the rest question
    and answer."""
    items = conflict_items() if items is None else items
    asked = [(x, cell, n % 2 == 0) for n, x in enumerate(items) for cell in CELLS]
    odds = _odds(model, asked, persona, batch_size)
    return Conflict(odds.reshape(len(items), -1))


def read_context(
    model: Model,
    items: Sequence[ConflictItem] | None = None,
    *,
    persona: str | None = None,
    batch_size: int = 32,
) -> np.ndarray:
    """S from pairs of conflicts, `[pair]`, in nats: how much the order alone decides in the first
    of a pair, and the need alone in the second. Every other pair is a narrative, the rest question
    and answer.

    What changes S changes order and need of a conflict alike, so that half the cells of twice as
    many conflicts give a shorter interval at the same cost.

    Raises:
        ShlError: the number of items is odd.
    """
    items = conflict_items() if items is None else items
    require(len(items) % 2 == 0, f"there are {len(items)} conflicts, pairs need an even number.")
    asked = [
        (item, cell, number // 2 % 2 == 0)
        for number, item in enumerate(items)
        for cell in CELLS[number % 2 * 2 :][:2]
    ]
    odds = _odds(model, asked, persona, batch_size).reshape(-1, 2, 2)
    return np.asarray((odds[:, :, 0] - odds[:, :, 1]).sum(1) / 2)


def _odds(
    model: Model,
    asked: Sequence[tuple[ConflictItem, tuple[str, int, str | None], bool]],
    persona: str | None,
    batch_size: int,
) -> np.ndarray:
    """Log-odds of action 0 against action 1 in a cell of an item, which is a narrative or not."""
    prefixes = []
    for item, cell, narrative in asked:
        text = item.text(cell)
        if narrative and not is_chat(model):
            prefixes.append(_plain(model, f"{text} So {item.name}", persona))
        else:
            question = f"{text} What did {item.name} do?"
            prefixes.append(_answer(model, question, item.name, persona))
    options = [[encode_text(model, f" {past}.") for past in item.past] for item, *_ in asked]
    # Two cells in a row differ in the action that is asked for first, not in what is before it.
    scores = option_scores(model, prefixes, options, batch_size=batch_size, group=2, relative=True)
    return np.asarray(scores[:, 0] - scores[:, 1])


def context_use(x: np.ndarray) -> float:
    """Coherence from `[item, 2]`, S of base and of a stage: the mean S over base's."""
    return float(x[:, 1].mean() / x[:, 0].mean())


def cloze_shift(x: np.ndarray) -> float:
    """Trait from `[item, 2]`, log-odds of base and of a stage: the mean difference, nats."""
    return float((x[:, 1] - x[:, 0]).mean())


def mean_kl(x: np.ndarray) -> float:
    """Divergence from `[text, 2]`, KL per token of base and of a stage to base: the mean, nats."""
    return float(x[:, 1].mean())


STATISTICS: Mapping[str, Callable[[np.ndarray], float]] = {
    "context": context_use,
    "cloze": cloze_shift,
    "kl": mean_kl,
}
"""What a stage's items come to beside base's, by instrument."""


def item_instruments(cloze: Cloze | None, conflicts: int) -> dict[str, Instrument]:
    """The instruments of this module for `shl.love`: `context` is S of the pairs among the first
    `conflicts` items, `kl` the KL per token to base on neutral answers, at which random vectors are
    matched; `cloze` is there for an axis that has one."""

    def context(model: Model, persona: str | None) -> dict[str, list[float]]:
        items = conflict_items()[:conflicts]
        return {"items": read_context(model, items, persona=persona).tolist()}

    def words(model: Model, persona: str | None) -> dict[str, list[float]]:
        assert cloze is not None
        return {"items": read_cloze(model, cloze, persona=persona).tolist()}

    on_base: list[Divergence] = []

    def divergence(model: Model, persona: str | None) -> dict[str, list[float]]:
        if not on_base:
            with unhooked(model):
                on_base.append(Divergence(model, NEUTRAL, tokens=TOKENS))
        return {"items": on_base[0](model, persona).tolist()}

    found: dict[str, Instrument] = {"context": context, "kl": divergence}
    return found if cloze is None else found | {"cloze": words}


def _answer(model: Model, question: str, begun: str, persona: str | None) -> list[int]:
    """Ids of a question and the beginning of its answer, in the model's own format."""
    ids = encode(model, Prompt(question, persona))
    return ids + encode_text(model, begun if is_chat(model) else f" {begun}")


def _plain(model: Model, text: str, persona: str | None) -> list[int]:
    """Ids of running text."""
    return encode_text(model, f"{persona}\n\n{text}" if persona else text, bos=True)
