"""Batched sampling with a KV cache; active hooks apply.

The loop differs from TransformerLens's `generate` in three points: logits are computed for the last
position only, each row has its own random stream, and finished rows leave the batch.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from transformer_lens.utilities.activation_functions import apply_softcap

from shl.config import GenerateConfig
from shl.fast import (
    KVCache,
    full_top_logits,
    largest,
    plain_unembedding,
    shortlist_applies,
    top_logits,
)
from shl.hooks.bake import fused_decoding
from shl.hooks.handle import handles_on, running
from shl.hooks.steering import Steering
from shl.models.nan_checks import require_finite
from shl.models.tokens import (
    PLAIN_STOPS,
    Prompt,
    as_prompt,
    decode,
    encode,
    end_ids,
    is_chat,
    length_batches,
    pad_left,
)
from shl.utils.errors import in_batches, require
from shl.utils.model import Model
from shl.utils.seeds import generator_for
from shl.utils.shapes import Float, Int, Mask, Tokens

MIN_PREFIX = 8
"""A separate forward pass of a shorter shared prefix takes longer than it saves."""
LONG = 32
"""Number of steps from which `fused_decoding` saves more time than merging the weights takes."""


def run(
    model: Model, tokens: Tokens, mask: Mask, cache: KVCache, *, layers: int | None = None
) -> Float[Tensor, "batch pos d_model"]:
    """The residual after the last layer, or after the first `layers`, for new tokens, which are
    added to the cache."""
    stop = model.cfg.n_layers if layers is None else layers
    return model(tokens, attention_mask=mask, past_kv_cache=cache, stop_at_layer=stop)


def prefill(
    model: Model,
    rows: Sequence[Sequence[int]],
    *,
    reserve: int = 0,
    layers: int | None = None,
    group: int = 1,
) -> tuple[Float[Tensor, "batch 1 d_model"], KVCache]:
    """The residual after the last layer at each row's last token, and the cache of all tokens.

    A prefix shared by all rows (a persona, a system turn) is run once, and so is one shared by the
    rows of a group, unless hooks require every row: handles with `per_row`, or hooks added through
    TransformerLens.

    Args:
        rows: token ids.
        reserve: the number of positions that will follow the prompts, for which the cache
            allocates memory.
        layers: number of layers to run, default all.
        group: every `group` consecutive rows begin with the same tokens.

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> residual, cache = prefill(tiny_gemma(), [[2, 9, 7], [2, 8]])
        >>> residual.shape, cache.length
        (torch.Size([2, 1, 32]), 3)
    """
    cache, before = None, 1
    done: Sequence[int] = [0] * len(rows)
    for each, ends in _levels(model, rows, group, reserve):
        firsts = range(0, len(rows), each)
        tokens, mask = pad_left(model, [rows[i][done[i] : ends[i]] for i in firsts])
        more = tokens.shape[1] + (reserve if each == 1 else 0)
        if cache is None:
            cache = KVCache.empty(model, len(firsts), more)
        else:
            parents = torch.tensor([i // before for i in firsts], device=tokens.device)
            cache = cache.rows(parents, cache.length + more)
        residual = run(model, tokens, mask, cache, layers=layers)
        before, done = each, ends
    assert cache is not None
    return residual[:, -1:], cache


def _levels(
    model: Model, rows: Sequence[Sequence[int]], group: int, reserve: int
) -> list[tuple[int, Sequence[int]]]:
    """Forward passes: how many rows have one beginning in common, and where it ends in each row."""
    whole = [len(row) for row in rows]
    levels: list[tuple[int, Sequence[int]]] = []
    done, width = [0] * len(rows), 0
    for each, least in ((len(rows), MIN_PREFIX), (group, 1)):
        ends = [
            end
            for first in range(0, len(rows), each)
            for end in [_common(rows[first : first + each])] * each
        ]
        new = [end - start for end, start in zip(ends, done, strict=True)]
        if each > 1 and min(new) >= least:
            levels.append((each, ends))
            done, width = ends, width + max(new)
    width += max(map(int.__sub__, whole, done)) + reserve
    # Padding between a beginning and the rest takes up part of a local attention window.
    window = model.cfg.window_size if model.cfg.use_local_attn else None
    fits = window is None or width <= window
    every_row = any(handle.per_row for handle in handles_on(model)) or any(
        point.fwd_hooks or point.bwd_hooks for point in model.hook_dict.values()
    )
    return [*(levels if fits and not every_row else []), (1, whole)]


def _common(rows: Sequence[Sequence[int]]) -> int:
    """The number of first tokens that all rows share, of each row all but the last at most."""
    same = takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
    return min(sum(1 for _ in same), min(map(len, rows)) - 1)


def next_logits(
    model: Model, residual: Float[Tensor, "batch 1 d_model"], *, k: int = 0
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """The `k` largest logits (descending, fp32) and their tokens, from the residual after the last
    layer at one position per row; with `k` 0 those of the whole vocabulary, in order of tokens.

    Example:
        >>> import torch
        >>> from shl.models.tiny import tiny_gemma
        >>> next_logits(tiny_gemma(), torch.ones(1, 1, 32), k=4)[1].shape
        torch.Size([1, 4])
    """
    hidden = model.ln_final(residual)
    cap = model.cfg.output_logits_soft_cap
    if k and plain_unembedding(model):
        bias = model.b_U if bool(model.b_U.any()) else None
        find = top_logits if shortlist_applies(model) else full_top_logits
        values, ids = find(hidden[:, 0], model.W_U, min(k, model.cfg.d_vocab), bias=bias)
        return apply_softcap(values, cap), ids
    logits = apply_softcap(model.unembed(hidden)[:, 0], cap).float()
    if k:
        return largest(logits, min(k, logits.shape[1]))
    return logits, torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1)


def sample(
    logits: Float[Tensor, "batch n"],
    draws: Float[Tensor, " batch"],
    config: GenerateConfig,
    tokens: Int[Tensor, "batch n"] | None = None,
) -> Int[Tensor, " batch"]:
    """Sample one token per row by inverse transform sampling with uniform `draws` in [0, 1), from
    the logits of `tokens`, by default the whole vocabulary. Tokens are taken in descending order of
    their logits, or from the whole distribution in the order given, without sorting.

    Raises:
        ShlError: the largest logit of a row is not finite.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
        >>> config = GenerateConfig(top_k=0, top_p=1.0)
        >>> [int(sample(logits, torch.tensor([u]), config)) for u in (0.49, 0.51, 0.81)]
        [0, 1, 2]
    """
    greedy = config.temperature == 0
    limit = 1 if greedy else config.top_k or logits.shape[1]
    require(bool(torch.isfinite(logits.amax(1)).all()), "the logits are not finite.")
    values, ids = logits, tokens
    if greedy or limit < logits.shape[1] or config.top_p < 1:
        values, order = largest(logits, min(limit, logits.shape[1]))
        ids = order if tokens is None else tokens.gather(1, order)
    if greedy:
        assert ids is not None
        return ids[:, 0]
    if values is logits:
        rank = _sample_in_order(logits / config.temperature, draws)
        return rank if ids is None else ids.gather(-1, rank[:, None])[:, 0]
    assert ids is not None
    p = (values / config.temperature).double().softmax(-1)
    cumulative = p.cumsum(-1)
    if config.top_p < 1:
        p = torch.where(cumulative - p < config.top_p, p, 0.0)
        cumulative = p.cumsum(-1)
    threshold = draws[:, None].double() * cumulative[:, -1:]
    # The first token whose cumulative probability exceeds the draw; it has a non-zero probability.
    rank = (cumulative > threshold).int().argmax(-1)
    return ids.gather(-1, rank[:, None])[:, 0]


def _sample_in_order(
    logits: Float[Tensor, "batch n"], draws: Float[Tensor, " batch"]
) -> Int[Tensor, " batch"]:
    """The place in each row that its draw falls on: the block first, then the place in it, so that
    only one block's cumulative sum is needed. Sums are in fp64."""
    size = math.gcd(logits.shape[1], 512)
    weights = (logits - logits.amax(1, keepdim=True)).exp().unflatten(1, (-1, size))
    sums = weights.sum(2, dtype=torch.float64)
    cumulative = sums.cumsum(1)
    threshold = draws[:, None].double() * cumulative[:, -1:]
    block = (cumulative > threshold).int().argmax(1, keepdim=True)
    before = (cumulative - sums).gather(1, block)
    chosen = block[..., None].expand(-1, 1, size)
    inside = weights.gather(1, chosen)[:, 0].double().cumsum(1)
    # The last place of the block with a weight is chosen at the latest, whatever sums round to.
    most = torch.nextafter(inside[:, -1:], torch.zeros_like(before))
    place = (inside > torch.minimum(threshold - before, most)).int().argmax(1)
    return block[:, 0] * size + place


@dataclass(frozen=True)
class Completion:
    """A model's answer to a prompt.

    `tokens` excludes the prompt and the end of the turn; `dose` is that of the innermost active
    steering (0 without any), at the start; `ended` is whether the turn ended before the token
    limit.

    A completion that was rewound (`shl.Backtrack`) has in `rewinds` the number of tokens kept and
    the new dose of each rewind in order, and in `doses` the dose at which each token was sampled.
    `base_nll` is the NLL of each token (nats) under the model that wrote it with all handles
    suspended, where decoding computed it: for one that was watched, and for one that was written
    without a handle from whole logits. Completions are compared without it.

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> [text] = generate(tiny_gemma(), ["Hello?"], max_new_tokens=3, min_new_tokens=3)
        >>> text.prompt.text, len(text.prompt_tokens), len(text.tokens)
        ('Hello?', 13, 3)
    """

    prompt: Prompt
    text: str
    tokens: tuple[int, ...]
    prompt_tokens: tuple[int, ...]
    dose: float = 0.0
    ended: bool = True
    doses: tuple[float, ...] = ()
    rewinds: tuple[tuple[int, float], ...] = ()
    base_nll: tuple[float, ...] = field(default=(), compare=False, repr=False)


def without_persona(model: Model, completion: Completion) -> Completion:
    """The same answer with the persona removed from the prompt, for context distillation (Askell et
    al. 2021, arXiv:2112.00861, section 2.1).

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> [text] = generate(tiny_gemma(), [Prompt("Hello?", "You are calm.")], max_new_tokens=3)
        >>> bare = without_persona(tiny_gemma(), text)
        >>> bare.prompt.persona, bare.tokens == text.tokens, len(bare.prompt_tokens)
        (None, True, 13)
    """
    if completion.prompt.persona is None:
        return completion
    bare = replace(completion.prompt, persona=None)
    return replace(completion, prompt=bare, prompt_tokens=tuple(encode(model, bare)))


@dataclass
class Batch:
    """Rows that are decoded together.

    Attributes:
        indices: of the rows in the caller's list.
        prompts: token ids.
        tokens: of each row so far.
        ended: whether a row's turn has ended.
        draws: `[row, token]`, the uniform draw of each token.
        active: the row of each row of the cache.
        cache: prompts and tokens but the last.
        last: `[active, 1]`, the last token of each active row.
        base_nll: NLL of each row's tokens, if no handle is on and logits are whole.
    """

    model: Model
    config: GenerateConfig
    seed: int
    indices: list[int]
    prompts: list[list[int]]
    tokens: list[list[int]]
    ended: list[bool]
    draws: Float[Tensor, "row token"]
    active: list[int]
    cache: KVCache
    last: Int[Tensor, "active 1"]
    base_nll: list[list[float]] = field(default_factory=list)

    def finished(self, row: int) -> bool:
        """Whether a row has all its tokens."""
        return self.ended[row] or len(self.tokens[row]) >= self.config.max_new_tokens

    def running(self, rows: Sequence[int]) -> AbstractContextManager[None]:
        """Declare `rows` as those of the forwards inside the body."""
        lengths = [len(self.prompts[row]) for row in rows]
        return running(rows=[self.indices[row] for row in rows], prompts=lengths)


History = tuple[tuple[float, ...], tuple[tuple[int, float], ...], tuple[float, ...]]


@runtime_checkable
class Watch(Protocol):
    """What is called between the steps of a batch, and may rewind its rows."""

    def check(self, batch: Batch) -> set[int]:
        """Called after each step, with one more token in each row that is not finished; the rows of
        the cache that are dropped. A finished row that is kept gets no tokens until it is dropped
        or rewound."""

    def history(self, row: int) -> History:
        """`doses`, `rewinds` and `base_nll` of a row's completion."""


@runtime_checkable
class Backtracking(Protocol):
    """What `generate` needs of `shl.Backtrack`."""

    def more_steps(self, max_new_tokens: int) -> int:
        """The largest number of steps that rewinds can add to those of plain decoding."""

    def watch(self, steering: Steering, doses: Sequence[float]) -> AbstractContextManager[Watch]:
        """Watch one batch, given the dose of each of the caller's rows; the steering has its own
        dose again at the end."""


def generate(
    model: Model,
    prompts: Sequence[str | Prompt],
    *,
    max_new_tokens: int = 32,
    min_new_tokens: int = 0,
    temperature: float = 1.0,
    top_k: int = 64,
    top_p: float = 0.95,
    batch_size: int = 64,
    seed: int = 0,
    backtrack: Backtracking | None = None,
) -> list[Completion]:
    """Sample one completion per prompt, in the order of the prompts.

    Row i has its own random stream, a function of (seed, i), so its samples do not depend on the
    batch. (Logits of other batch shapes differ in their last bits, which can change a sample whose
    draw lies that close to a boundary.)

    Args:
        temperature: 0 is greedy.
        top_k: 0 is the whole vocabulary.
        top_p: applied after `top_k`; 1 disables it.
        backtrack: `shl.Backtrack()` rewinds a completion that becomes incoherent, and goes on at a
            weaker dose of the innermost steering.

    Raises:
        ShlError: a setting is out of range, prompt and completion do not fit into the context,
            logits are not finite, or `backtrack` is given and no steering is active.

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> [c.dose for c in generate(tiny_gemma(), ["Hello?"], max_new_tokens=3)]
        [0.0]
    """
    config = GenerateConfig(max_new_tokens, min_new_tokens, temperature, top_k, top_p, batch_size)
    questions = [as_prompt(prompt) for prompt in prompts]
    rows = [encode(model, prompt) for prompt in questions]
    longest = max(map(len, rows), default=0)
    more = backtrack.more_steps(max_new_tokens) if backtrack is not None else 0
    new = f"{max_new_tokens} new ones" + (f" with {more} more to rewind" if more else "")
    require(
        longest + max_new_tokens + more <= model.cfg.n_ctx,
        f"a prompt of {longest} tokens and {new} do not fit into the context of {model.cfg.n_ctx}.",
    )
    doses = _doses(model, len(rows))
    steering = innermost_steering(model)
    require(
        backtrack is None or steering is not None,
        "backtrack is given and no steering is active, there must be one whose dose it weakens.",
    )
    done: dict[int, Completion] = {}
    batches = length_batches([len(row) for row in rows], batch_size)
    long = len(batches) * max_new_tokens >= LONG
    # The logits of base itself: their NLL takes no further forward pass.
    by_base = backtrack is None and not handles_on(model) and not shortlist_applies(model)

    def work(indices: list[int]) -> None:
        prompts = [rows[i] for i in indices]
        watching: AbstractContextManager[Watch | None] = nullcontext()
        if backtrack is not None and steering is not None:
            watching = backtrack.watch(steering, doses)
        with watching as watch:
            batch = _decode_batch(model, indices, prompts, config, seed, watch, more, by_base)
            for row, i in enumerate(indices):
                tokens, ended = tuple(batch.tokens[row]), batch.ended[row]
                history: History = ((), (), ())
                if watch is not None:
                    history = watch.history(row)
                elif by_base:
                    history = ((), (), tuple(batch.base_nll[row][: len(tokens)]))
                text, prompt = decode(model, tokens), tuple(rows[i])
                done[i] = Completion(questions[i], text, tokens, prompt, doses[i], ended, *history)

    with torch.no_grad(), fused_decoding(model) if long else nullcontext():
        in_batches(batches, work, "generation")
    return [done[i] for i in range(len(rows))]


def innermost_steering(model: Model) -> Steering | None:
    """The active steering that was added last, or None."""
    steerings = [h for h in handles_on(model) if isinstance(h, Steering)]
    return steerings[-1] if steerings else None


def _doses(model: Model, rows: int) -> list[float]:
    """The dose of the innermost steering for each row."""
    for handle in handles_on(model):
        n = rows if handle.rows is None else handle.rows
        require(n == rows, f"a hook has doses or a mask for {n} rows, there are {rows} prompts.")
    steering = innermost_steering(model)
    dose = steering.dose if steering is not None else 0.0
    if not isinstance(dose, Tensor):
        return [float(dose)] * rows
    shape = tuple(dose.shape)
    require(dose.ndim == 1, f"a steering has doses of shape {shape}, generation needs ({rows},).")
    return [float(x) for x in dose]


def _decode_batch(
    model: Model,
    indices: list[int],
    rows: list[list[int]],
    config: GenerateConfig,
    seed: int,
    watch: Watch | None = None,
    more_steps: int = 0,
    by_base: bool = False,
) -> Batch:
    device = model.W_U.device
    streams = [generator_for(seed, "token", i) for i in indices]
    draws = torch.stack([torch.rand(config.max_new_tokens, generator=g) for g in streams])
    ends = end_ids(model)
    stop_ids = torch.tensor(sorted(ends), device=device)
    limit = 1 if config.temperature == 0 else config.top_k
    # End tokens may be masked below, so request as many more.
    k = limit + len(ends) if limit and not by_base else 0
    with running(rows=indices, prompts=[len(row) for row in rows]):
        residual, cache = prefill(model, rows, reserve=config.max_new_tokens + more_steps)
    batch = Batch(
        model,
        config,
        seed,
        indices,
        rows,
        tokens=[[] for _ in rows],
        ended=[False] * len(rows),
        draws=draws.to(device),
        active=list(range(len(rows))),
        cache=cache,
        last=torch.tensor([row[-1:] for row in rows], device=device),
        base_nll=[[] for _ in rows],
    )
    while True:
        active, tokens = batch.active, batch.tokens
        counts = [len(tokens[row]) for row in active]
        with batch.running(active):
            logits, ids = next_logits(model, residual, k=k)
            require_finite(
                logits.amax(1),
                f"a logit of token {max(counts)}",
                model,
                lambda: [[*rows[row], *tokens[row]] for row in active],  # noqa: B023
                [indices[row] for row in active],
            )
        whole = logits
        early = torch.tensor([n < config.min_new_tokens for n in counts], device=device)
        if bool(early.any()):
            logits = logits.masked_fill(early[:, None] & torch.isin(ids, stop_ids), -torch.inf)
        places = [min(n, config.max_new_tokens - 1) for n in counts]
        chosen = sample(logits, batch.draws[active, places], config, ids)
        if by_base:
            nll = whole.logsumexp(1) - whole.gather(1, chosen[:, None])[:, 0]
            for row, value in zip(active, nll.tolist(), strict=True):
                batch.base_nll[row].append(value)
        for row, token, n in zip(active, chosen.tolist(), counts, strict=True):
            if not batch.finished(row):
                tokens[row].append(token)
                may_end = n + 1 >= config.min_new_tokens
                batch.ended[row] = _cut_turn_end(model, tokens[row], ends, may_end)
        batch.last = chosen[:, None]
        if watch is None:
            dropped = {at for at, row in enumerate(active) if batch.finished(row)}
        else:
            dropped = watch.check(batch)
        if len(dropped) == len(active):
            return batch
        if dropped:
            order = batch.cache.drop(dropped)
            batch.active = [active[at] for at in order]
            batch.last = batch.last[order]
        with batch.running(batch.active):
            residual = run(model, batch.last, torch.ones_like(batch.last), batch.cache)


def _cut_turn_end(model: Model, ids: list[int], ends: frozenset[int], may_end: bool) -> bool:
    """Whether the turn has ended; removes the tokens of its end from `ids`."""
    if ids[-1] in ends:
        ids.pop()
        return True
    # A stop text has three characters, so the last four tokens contain it.
    tail = "" if is_chat(model) or not may_end else decode(model, ids[-4:])
    if not any(stop in tail for stop in PLAIN_STOPS):
        return False
    text = decode(model, ids)
    answer = len(text[: max(map(text.rfind, PLAIN_STOPS))].rstrip())
    while ids and len(decode(model, ids).rstrip()) > answer:
        ids.pop()
    return True
