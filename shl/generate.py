"""Batched, cached sampling under whatever hooks are on.

TransformerLens's own blocks do the work; only the loop around them is ours: logits for the last
position alone, one random stream per row, and finished rows leave the batch.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from shl.config import GenerateConfig
from shl.errors import check
from shl.finite import require_finite
from shl.halving import in_batches
from shl.hooks import decoding, handles_on, running
from shl.prefill import prefill, run
from shl.sampling import next_logits, sample
from shl.seeds import generator_for
from shl.steering import Steering
from shl.tokens import (
    PLAIN_STOPS,
    Prompt,
    as_prompt,
    decode,
    encode,
    end_ids,
    is_chat,
    length_batches,
)

LONG = 16
"""From so many steps in all a call gains from `decoding`, which first copies weights."""


@dataclass(frozen=True)
class Completion:
    """What a model answered.

    `tokens` are the completion's own, without prompt and turn end; `dose` is the nominal one of
    the innermost steering that was on (0 without any); `ended` tells whether the turn's end came
    before the token limit.

    Example:
        >>> from shl.tiny import tiny_gemma
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


def without_persona(model: HookedTransformer, completion: Completion) -> Completion:
    """The same answer to the question alone: what a student learns from a prompted teacher
    (context distillation, Askell et al. 2021, arXiv:2112.00861, section 2.1).

    Example:
        >>> from shl.tiny import tiny_gemma
        >>> [text] = generate(tiny_gemma(), [Prompt("Hello?", "You are calm.")], max_new_tokens=3)
        >>> bare = without_persona(tiny_gemma(), text)
        >>> bare.prompt.persona, bare.tokens == text.tokens, len(bare.prompt_tokens)
        (None, True, 13)
    """
    if completion.prompt.persona is None:
        return completion
    bare = Prompt(completion.prompt.text)
    return replace(completion, prompt=bare, prompt_tokens=tuple(encode(model, bare)))


def generate(
    model: HookedTransformer,
    prompts: Sequence[str | Prompt],
    *,
    max_new_tokens: int = 64,
    min_new_tokens: int = 0,
    temperature: float = 1.0,
    top_k: int = 64,
    top_p: float = 0.95,
    batch_size: int = 32,
    seed: int = 0,
) -> list[Completion]:
    """Complete each prompt once; the result is in the order of the prompts.

    Row i draws from its own random stream, a function of (seed, i), so its choices do not depend
    on the batch it landed in. (Logits of other batch shapes differ in their last bits; a draw
    that falls within that of a boundary may differ.)

    Args:
        temperature: 0 is greedy.
        top_k: 0 keeps every token.
        top_p: applied after `top_k`; 1 keeps all of them.

    Raises:
        ShlError: a setting out of range, a prompt that leaves no room in the context, or logits
            that are not finite.

    Example:
        >>> from shl.tiny import tiny_gemma
        >>> [c.dose for c in generate(tiny_gemma(), ["Hello?"], max_new_tokens=3)]
        [0.0]
    """
    config = GenerateConfig(max_new_tokens, min_new_tokens, temperature, top_k, top_p, batch_size)
    asked = [as_prompt(prompt) for prompt in prompts]
    rows = [encode(model, prompt) for prompt in asked]
    longest = max(map(len, rows), default=0)
    check(
        longest + max_new_tokens <= model.cfg.n_ctx,
        f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit the context of "
        f"{model.cfg.n_ctx}.",
    )
    doses = _doses(model, len(rows))
    done: dict[int, Completion] = {}

    batches = length_batches([len(row) for row in rows], batch_size)
    long = len(batches) * max_new_tokens >= LONG

    def work(indices: list[int]) -> None:
        decoded = _decode_batch(model, indices, [rows[i] for i in indices], config, seed, long)
        for i, (tokens, ended) in zip(indices, decoded, strict=True):
            text = decode(model, tokens)
            done[i] = Completion(asked[i], text, tuple(tokens), tuple(rows[i]), doses[i], ended)

    in_batches(batches, work, "generation")
    return [done[i] for i in range(len(rows))]


def _doses(model: HookedTransformer, rows: int) -> list[float]:
    handles = handles_on(model)
    steerings = [h for h in handles if isinstance(h, Steering)]
    dose = steerings[-1].dose if steerings else 0.0
    if isinstance(dose, Tensor):
        check(len(dose) == rows, f"{len(dose)} per-row doses were given for {rows} prompts.")
    for handle in handles:
        given = rows if handle.rows is None else handle.rows
        check(given == rows, f"a hook has doses or a mask for {given} rows, not {rows} prompts.")
    return [float(x) for x in dose] if isinstance(dose, Tensor) else [float(dose)] * rows


@torch.no_grad()
def _decode_batch(
    model: HookedTransformer,
    indices: list[int],
    rows: list[list[int]],
    config: GenerateConfig,
    seed: int,
    long: bool,
) -> list[tuple[list[int], bool]]:
    device = model.W_U.device
    draws = torch.stack(
        [
            torch.rand(config.max_new_tokens, generator=generator_for(seed, "token", i))
            for i in indices
        ]
    ).to(device)
    ends = end_ids(model)
    stop_ids = torch.tensor(sorted(ends), device=device)
    limit = 1 if config.temperature == 0 else config.top_k
    # Turn ends may be struck from the list, so ask for as many more.
    wanted = limit + len(ends) if limit else 0
    active = list(range(len(rows)))
    out: list[list[int]] = [[] for _ in rows]
    ended = [False] * len(rows)
    new: Tensor | None = None
    with ExitStack() as steps:
        for step in range(config.max_new_tokens):
            with running(rows=[indices[i] for i in active], prompts=[len(rows[i]) for i in active]):
                if new is None:
                    residual, cache = prefill(model, rows, room=config.max_new_tokens)
                    if long:
                        steps.enter_context(decoding(model, len(rows)))
                else:
                    residual = run(model, new, torch.ones_like(new), cache)
                logits, ids = next_logits(model, residual, k=wanted)
                require_finite(
                    logits.amax(1),
                    f"a logit of token {step}",
                    model,
                    lambda: [[*rows[i], *out[i]] for i in active],  # noqa: B023
                    [indices[i] for i in active],
                )
            if step < config.min_new_tokens:
                logits = logits.masked_fill(torch.isin(ids, stop_ids), -torch.inf)
            chosen = sample(logits, draws[active, step], config, ids)
            for i, token in zip(active, chosen.tolist(), strict=True):
                out[i].append(token)
                ended[i] = _cut_turn_end(model, out[i], ends, step + 1 >= config.min_new_tokens)
            gone = {row for row, i in enumerate(active) if ended[i]}
            if len(gone) == len(active):
                break
            if gone:
                order = cache.drop(gone)
                active = [active[row] for row in order]
                chosen = chosen[order]
            new = chosen[:, None]
    return list(zip(out, ended, strict=True))


def _cut_turn_end(
    model: HookedTransformer, ids: list[int], ends: frozenset[int], may_end: bool
) -> bool:
    """Whether the turn has ended; what belongs to its end is taken off `ids`."""
    if ids[-1] in ends:
        ids.pop()
        return True
    # A stop text has three characters, so it shows within the last four tokens.
    tail = "" if is_chat(model) or not may_end else decode(model, ids[-4:])
    if not any(stop in tail for stop in PLAIN_STOPS):
        return False
    text = decode(model, ids)
    answer = len(text[: max(map(text.rfind, PLAIN_STOPS))].rstrip())
    while ids and len(decode(model, ids).rstrip()) > answer:
        ids.pop()
    return True
