"""Backtracking: a completion that becomes incoherent is rewound and continued at a weaker dose.

Every few tokens the new ones are scored under base, one cached forward for all rows. A row whose
window has gone wrong keeps its clean tokens, and continues from them with a smaller dose and new
random numbers. The cache of what it keeps is computed again: keys of the stronger dose would carry
it on.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Annotated

import torch
from torch import Tensor

from shl.config import Count, CountOrZero, FilterConfig, NonNegative, Range, Settings, Share
from shl.fast import KVCache
from shl.hooks.handle import suspended
from shl.hooks.sites import final_hidden, readout
from shl.hooks.steering import Steering
from shl.hooks.vector import SteeringVector
from shl.kl import nll_and_top
from shl.kl.divergence import fp32_log_probs
from shl.method.filters import text_reasons, words_of
from shl.models.generate import Batch, Completion, History, innermost_steering, prefill, run
from shl.models.nan_checks import require_finite
from shl.models.scores import completion_hidden
from shl.models.tokens import decode
from shl.utils.errors import require
from shl.utils.model import Model
from shl.utils.seeds import generator_for
from shl.utils.shapes import Float

LOOPS = ("word_loop", "char_loop")
"""The rules of the filter that are applied to the text so far."""
FEW_WORDS = 16
"""The rules are for whole texts: of fewer words than this, a word that occurs twice is no loop
[words]."""


@dataclass(frozen=True)
class Backtrack(Settings):
    """When a completion is rewound, and how it continues: `generate(..., backtrack=Backtrack())`.

    Each `window` of tokens is scored under base with all handles suspended. It has gone wrong if
    its mean NLL is above the filter's log(max_tail_perplexity), or above the mean of the row's
    earlier tokens by more than `max_rise`; if base's largest probability has a mean above
    `max_top_prob`; or if the filter finds a loop in the text so far. The row then keeps the tokens
    up to the last clean window, or one window less if nothing was clean since the last rewind.
    Completions of dose 0 are not watched.

    FASB (Flexible Activation Steering with Backtracking, arXiv:2508.17621) decides from internal
    states when and how strongly to steer and backtracks a fixed number of tokens; here every token
    is steered, base decides from the text when to rewind, and a rewind goes to the last clean
    window and lowers the dose.

    Raises:
        ShlError: a value is out of range, or max_rewind is below the window.

    Example:
        >>> Backtrack(filter=FilterConfig(max_tail_perplexity=20.0)).factor
        0.6
    """

    window: Count = 8
    """Tokens from one check to the next; the last check is on the last tokens of the completion, as
    many [tokens]."""
    max_rise: NonNegative = 3.0
    """Largest rise of a window's mean NLL above the mean of the tokens before it [nats]."""
    max_top_prob: Share = 0.95
    """Largest mean over a window of base's largest probability [probability]."""
    max_rewind: Count = 16
    """Largest number of tokens that one rewind removes [tokens]."""
    max_rewinds: CountOrZero = 3
    """Rewinds of one completion; if it goes wrong once more, it ends after its clean tokens
    [count]."""
    factor: Annotated[float, Range(0, 1, above=True)] = 0.6
    """The dose after a rewind over the dose before it."""
    recover_after: Count = 24
    """Clean tokens at one dose after which it rises [tokens]."""
    recover_by: Annotated[float, Range(1)] = 1.25
    """Factor by which it rises, up to the dose at which the completion began."""
    filter: FilterConfig = field(default_factory=FilterConfig)
    """Thresholds of the NLL (max_tail_perplexity) and of loops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Range(self.window).check("max_rewind", self.max_rewind)

    def reasons(self, text: str, nll: Sequence[float], top: Sequence[float]) -> tuple[str, ...]:
        """Why the last window of a text has gone wrong, empty if it has not.

        Args:
            text: so far.
            nll: of each token under base, nats.
            top: base's largest probability at each token.

        Example:
            >>> Backtrack(window=2).reasons("so it goes", [0.5, 0.5, 4.0, 4.5], [0.1] * 4)
            ('incoherent', 'rise')
        """
        last, before = nll[-self.window :], nll[: -self.window]
        mean = _mean(last)
        fired = {
            "incoherent": mean > math.log(self.filter.max_tail_perplexity),
            "rise": bool(before) and mean - _mean(before) > self.max_rise,
            "too_predictable": _mean(top[-self.window :]) > self.max_top_prob,
        }
        rules = text_reasons(text, self.filter) if len(words_of(text)) >= FEW_WORDS else []
        return (
            *(name for name, found in fired.items() if found),
            *(r for r in rules if r in LOOPS),
        )

    def kept(self, count: int, again: int) -> int:
        """Tokens that are kept of `count`, after `again` rewinds since the last clean window.

        Example:
            >>> [Backtrack().kept(24, again) for again in (0, 1, 2)], Backtrack().kept(21, 0)
            ([16, 8, 8], 16)
        """
        clean = (count - 1) // self.window * self.window
        least = -(-max(0, count - self.max_rewind) // self.window) * self.window
        return min(clean, max(least, clean - again * self.window, 0))

    def more_steps(self, max_new_tokens: int) -> int:
        """The largest number of steps that are added to plain decoding, by rewinds and where a
        finished row waits for its check."""
        lost = self.max_rewinds * min(self.max_rewind, max_new_tokens)
        return lost + (self.max_rewinds + 1) * self.window

    @contextmanager
    def watch(self, steering: Steering, doses: Sequence[float]) -> Iterator["Watched"]:
        """Watch one batch of `generate`; the steering has its own dose again at the end."""
        with ExitStack() as stack:
            yield Watched(self, steering, doses, stack)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@dataclass
class Row:
    """What is known of a row.

    Attributes:
        first, dose: the dose at the start and now.
        doses, nll, top: of each token checked so far, the dose, and the scores under base.
        clean: clean tokens since the dose changed.
        again: rewinds since the last clean window.
        rewinds: tokens kept and new dose of each.
        over: whether it went wrong after its last rewind.
    """

    first: float
    dose: float
    doses: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    top: list[float] = field(default_factory=list)
    clean: int = 0
    again: int = 0
    rewinds: list[tuple[int, float]] = field(default_factory=list)
    over: bool = False

    def to_length(self, count: int) -> None:
        """Forget tokens from `count` on; new ones have the dose of now."""
        for values in (self.doses, self.nll, self.top):
            del values[count:]
        self.doses += [self.dose] * (count - len(self.doses))


class Watched:
    """The state of a `Backtrack` over one batch."""

    def __init__(
        self, settings: Backtrack, steering: Steering, doses: Sequence[float], stack: ExitStack
    ) -> None:
        self.settings, self.steering, self.doses, self._stack = settings, steering, doses, stack
        self.rows: dict[int, Row] = {}
        self._base: KVCache | None = None  # of prompts and checked tokens but the last
        self._table: Tensor | None = None  # the dose of each of the caller's rows

    def history(self, row: int) -> History:
        """The dose of each token, empty without a rewind, the rewinds, and the NLL under base."""
        known = self.rows[row]
        doses = tuple(known.doses) if known.rewinds else ()
        return doses, tuple(known.rewinds), tuple(known.nll)

    def check(self, batch: Batch) -> set[int]:
        """Once the rows have whole windows, score what is new and rewind the rows that went wrong;
        the places of those that are finished.

        Raises:
            ShlError: a prompt has a single token.
            NotFiniteError: a score is NaN or infinite.
        """
        if not self.rows:
            shortest = min(map(len, batch.prompts))
            require(shortest > 1, f"a prompt has {shortest} token, backtracking needs 2 or more.")
            firsts = [float(self.doses[i]) for i in batch.indices]
            self.rows = {row: Row(dose, dose) for row, dose in enumerate(firsts)}
        for row in batch.active:
            self.rows[row].to_length(len(batch.tokens[row]))
        # Rows that are not finished all have the same number of tokens beyond whole windows.
        window = self.settings.window
        counts = [len(batch.tokens[row]) for row in batch.active if not batch.finished(row)]
        if all(count % window == 0 for count in counts):
            due = [place for place, row in enumerate(batch.active) if self._due(row)]
            if due:
                self._score(batch, due)
            self._rewind(batch, [at for at in due if self._wrong(batch, batch.active[at])])
        gone = {
            place
            for place, row in enumerate(batch.active)
            if (batch.finished(row) or self.rows[row].over) and not self._due(row)
        }
        if self._base is not None:
            self._base.drop(gone)
        return gone

    def _steps(self, batch: Batch) -> int:
        """The largest number of tokens after a prompt."""
        most = batch.config.max_new_tokens
        return most + self.settings.more_steps(most)

    def _due(self, row: int) -> bool:
        known = self.rows[row]
        return known.dose != 0 and len(known.doses) > len(known.nll)

    def _score(self, batch: Batch, due: Sequence[int]) -> None:
        """Add base's scores of the new tokens, one forward for all rows."""
        model, device = batch.model, batch.last.device
        pieces: list[list[int]] = [[] for _ in batch.active]
        for place in due:
            row = batch.active[place]
            ids = [*batch.prompts[row], *batch.tokens[row]]
            pieces[place] = ids[len(batch.prompts[row]) - 1 + len(self.rows[row].nll) : -1]
        width = max(map(len, pieces))
        # Padding on the right: a row that has less is finished, and laid again if it is rewound.
        tokens = torch.tensor([[*piece, *[0] * (width - len(piece))] for piece in pieces])
        mask = torch.tensor([[1] * len(p) + [0] * (width - len(p)) for p in pieces])
        with suspended(model):
            if self._base is None:
                prompts = [batch.prompts[row][:-1] for row in batch.active]
                self._base = prefill(model, prompts, reserve=self._steps(batch))[1]
            residual = run(model, tokens.to(device), mask.to(device), self._base)
            hidden = torch.cat([residual[place, : len(pieces[place])] for place in due])
            new = [batch.tokens[batch.active[place]][-len(pieces[place]) :] for place in due]
            targets = torch.tensor([token for ids in new for token in ids], device=device)
            scores = nll_and_top(final_hidden(model, hidden), model.W_U, targets, **readout(model))
            require_finite(
                scores[0],
                "a token's NLL under base",
                model,
                lambda: [[*batch.prompts[row], *batch.tokens[row]] for row in batch.active],
            )
        parts = (values.cpu().split(list(map(len, new))) for values in scores)
        for place, nll, top in zip(due, *parts, strict=True):
            self.rows[batch.active[place]].nll += nll.tolist()
            self.rows[batch.active[place]].top += top.tolist()

    def _wrong(self, batch: Batch, row: int) -> bool:
        """Whether a row is rewound; counts its clean tokens if not."""
        known, settings = self.rows[row], self.settings
        tokens = batch.tokens[row]
        if not settings.reasons(decode(batch.model, tokens), known.nll, known.top):
            known.again = 0
            known.clean += settings.window
            if known.clean >= settings.recover_after and abs(known.dose) < abs(known.first):
                risen = known.dose * settings.recover_by
                self._set_dose(batch, row, min(risen, known.first, key=abs))
            return False
        known.over = len(known.rewinds) == settings.max_rewinds
        kept = settings.kept(len(tokens), 0 if known.over else known.again)
        batch.tokens[row] = tokens[:kept]
        batch.ended[row] = False
        known.to_length(kept)
        if known.over:
            return False
        self._set_dose(batch, row, known.dose * settings.factor)
        known.again += 1
        known.rewinds.append((kept, known.dose))
        key = ("token", batch.indices[row], "attempt", len(known.rewinds))
        batch.draws[row] = torch.rand(
            batch.draws.shape[1], generator=generator_for(batch.seed, *key)
        )
        return True

    def _set_dose(self, batch: Batch, row: int, dose: float) -> None:
        known = self.rows[row]
        known.dose, known.clean = dose, 0
        if self._table is None:
            given = self.steering.dose
            dtype = given.dtype if isinstance(given, Tensor) else torch.float32
            self._table = torch.tensor(self.doses, dtype=dtype, device=batch.last.device)
            self._stack.enter_context(self.steering.dosed(self._table))
        self._table[batch.indices[row]] = dose

    def _rewind(self, batch: Batch, places: Sequence[int]) -> None:
        """Compute the steered cache of some rows again, and drop what they lost from base's."""
        if not places or self._base is None:
            return
        rows = [batch.active[place] for place in places]
        kept = [[*batch.prompts[row], *batch.tokens[row]] for row in rows]
        left = self._steps(batch) - min(len(batch.tokens[row]) for row in rows)
        with batch.running(rows):
            _, cache = prefill(batch.model, [ids[:-1] for ids in kept], reserve=left)
        batch.cache.put(places, cache)
        for place, ids in zip(places, kept, strict=True):
            self._base.shorten(place, len(ids) - 1)
            batch.last[place] = ids[-1]


def dose_table(completions: Sequence[Completion], dose: float) -> Float[Tensor, "batch pos"]:
    """The dose of each position of some completions: the position that predicts a token has the
    token's dose, those before it the first token's.

    Args:
        dose: of completions without `doses`; where its sign is not that of a completion's dose, the
            completion's doses get the opposite sign.

    Example:
        >>> from shl.models.tokens import Prompt
        >>> text = Completion(Prompt("?"), "ab", (5, 6), (2, 9, 7), 1.0, doses=(1.0, 0.5))
        >>> dose_table([text], 1.0)
        tensor([[1.0000, 1.0000, 1.0000, 0.5000, 0.5000]])
    """
    width = max(len(c.prompt_tokens) + len(c.tokens) for c in completions)
    table = torch.full((len(completions), width), float(dose))
    for i, c in enumerate(completions):
        if c.doses:
            first = len(c.prompt_tokens) - 1
            own = [c.doses[0]] * first + list(c.doses)
            own += [c.doses[-1]] * (width - len(own))
            table[i] = torch.tensor(own) * (-1.0 if c.dose * dose < 0 else 1.0)
    return table


def at_own_doses(model: Model, completions: Sequence[Completion]) -> AbstractContextManager[None]:
    """Inside the body, the innermost steering acts on each token of completions that were rewound
    at its own dose; nothing changes if none was."""
    steering = innermost_steering(model)
    if steering is None or not any(c.doses for c in completions):
        return nullcontext()
    dose = steering.dose
    require(
        not isinstance(dose, Tensor),
        "the steering has per-row doses, completions with doses of their own need a single one.",
    )
    return steering.dosed(dose_table(completions, float(dose)))


@torch.no_grad()
def replay(
    model: Model, completion: Completion, vector: SteeringVector
) -> Float[Tensor, "tok vocab"]:
    """Log-probabilities of the whole vocabulary where each token of a completion was sampled, from
    its doses and rewinds: after a rewind the tokens before it have the new dose.

    Example:
        >>> from shl.models.generate import generate
        >>> from shl.models.tiny import tiny_gemma
        >>> model, v = tiny_gemma(), SteeringVector({1: torch.ones(32)}, "tiny", "demo", 1)
        >>> with v.steering(model, 2.0):
        ...     [text] = generate(
        ...         model, ["Hello?"], max_new_tokens=4, temperature=0, backtrack=Backtrack()
        ...     )
        >>> replay(model, text, v).argmax(1).tolist() == list(text.tokens)
        True
    """
    starts: list[tuple[int, float]] = [(0, completion.dose)]
    for kept, dose in completion.rewinds:
        starts = [start for start in starts if start[0] < kept] + [(kept, dose)]
    count = len(completion.tokens)
    starts = [start for start in starts if start[0] < count]
    ends = [*(start for start, _ in starts[1:]), count][: len(starts)]
    parts = []
    for (start, dose), end in zip(starts, ends, strict=True):
        own = completion.doses[start:end] or (dose,) * end
        doses = (dose,) * start + own
        part = replace(completion, tokens=completion.tokens[:end], doses=doses)
        with vector.steering(model, dose_table([part], completion.dose)):
            parts.append(completion_hidden(model, [part])[start:])
    hidden = torch.cat(parts) if parts else model.W_U.new_empty(0, model.cfg.d_model)
    return fp32_log_probs(hidden, model.W_U, **readout(model))
