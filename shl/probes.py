"""The two styles of reading vignettes: raw scores per item, stem or order, and option."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from shl.axes import DATA
from shl.cache import KeyValues
from shl.config import FOUNDATIONS, EvalConfig
from shl.errors import check
from shl.finite import require_finite
from shl.halving import in_batches
from shl.kl import log_probs_at
from shl.prefill import prefill, run
from shl.sites import final_hidden, readout
from shl.tokens import Prompt, encode, encode_text, length_batches


@dataclass(frozen=True)
class Vignette:
    """One short scene in the third person, and the foundation that it breaks."""

    foundation: str
    text: str


@cache
def vignettes() -> tuple[Vignette, ...]:
    """The built-in vignettes, 12 for each of the seven readings.

    Example:
        >>> len(vignettes())
        84
    """
    table = tomllib.loads((DATA / "vignettes.toml").read_text("utf-8"))
    return tuple(Vignette(**entry) for entry in table["vignette"])


@cache
def probe_data() -> Mapping[str, object]:
    """Stems, options and the digit question, from `data/probe.toml`."""
    return MappingProxyType(tomllib.loads((DATA / "probe.toml").read_text("utf-8")))


@torch.no_grad()
def read_completions(
    model: HookedTransformer, items: Sequence[Vignette], persona: str | None, config: EvalConfig
) -> Tensor:
    """`[item, stem, option]`: summed log-probabilities of whole options.

    A vignette is run once; each stem continues its cache, and each option that of the stem.
    """
    asked = probe_data()["completion"]
    assert isinstance(asked, list)
    stems = [encode_text(model, entry["stem"]) for entry in asked]
    options = [[encode_text(model, text) for text in entry["options"]] for entry in asked]
    before = f"{persona}\n\n" if persona else ""
    rows = [encode_text(model, before + v.text, bos=True) for v in items]
    out = torch.zeros(len(rows), len(stems), len(FOUNDATIONS))

    def work(chosen: list[int]) -> None:
        _, start = prefill(model, [rows[i] for i in chosen])
        for k, stem in enumerate(stems):
            # Stems go one by one: padding between a stem and its options would count towards
            # the sliding window.
            scores = _score_options(model, start, stem, options[k], len(chosen))
            require_finite(
                scores,
                f"a score of stem {k} on vignettes {chosen}",
                model,
                lambda: [[*rows[i], *stem, *o] for i in chosen for o in options[k]],  # noqa: B023
            )
            out[chosen, k] = scores

    in_batches(length_batches([len(row) for row in rows], config.batch_size), work, "the probe")
    return out


def _score_options(
    model: HookedTransformer,
    start: KeyValues,
    stem: list[int],
    options: list[list[int]],
    items: int,
) -> Tensor:
    """`[item, option]`: log-probability of each option after the cached text and the stem."""
    device = model.W_U.device
    each = torch.arange(items, device=device)
    kv = start.rows(each, start.length + len(stem))
    tokens, mask = _pad_right([stem], items, device)
    last = run(model, tokens, mask, kv)[:, -1]
    firsts = torch.tensor([option[0] for option in options], device=device)
    scores = log_probs_at(
        final_hidden(model, last), model.W_U, firsts.expand(items, -1), **readout(model)
    )
    # Every option but its last token is run, to predict the token after it.
    if any(len(option) > 1 for option in options):
        kv = kv.rows(each.repeat_interleave(len(options)), kv.length + max(map(len, options)) - 1)
        tokens, _ = _pad_right([option[:-1] for option in options], items, device)
        targets, real = _pad_right([option[1:] for option in options], items, device)
        residual = run(model, tokens, real, kv)
        rest = torch.zeros(tokens.shape, device=device)
        rest[real.bool()] = log_probs_at(
            final_hidden(model, residual[real.bool()]),
            model.W_U,
            targets[real.bool()][:, None],
            **readout(model),
        )[:, 0]
        scores = scores + rest.sum(1).view(scores.shape)
    return scores.cpu()


def _pad_right(
    rows: Sequence[Sequence[int]], times: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`rows`, padded on the right and repeated as a whole, and their mask."""
    width = max(map(len, rows))
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return tokens.repeat(times, 1), mask.repeat(times, 1)


@torch.no_grad()
def read_digits(
    model: HookedTransformer, items: Sequence[Vignette], persona: str | None, config: EvalConfig
) -> Tensor:
    """`[item, order, option]`: log-probability of the option's digit as the answer."""
    asked = probe_data()["digits"]
    assert isinstance(asked, dict)
    n = len(FOUNDATIONS)
    orders = [list(range(n)), list(range(n))[::-1]]
    digits = [encode_text(model, str(k + 1)) for k in range(n)]
    check(
        all(len(ids) == 1 for ids in digits),
        "the tokenizer splits a single digit, the digit probe needs one token each.",
    )
    rows, places = [], []
    for item, v in enumerate(items):
        for k, order in enumerate(orders):
            listed = "\n".join(f"{j + 1}. {asked['options'][o]}" for j, o in enumerate(order))
            text = asked["question"].format(vignette=v.text, options=listed)
            begun = encode_text(model, asked["answer"])
            rows.append(encode(model, Prompt(text, persona)) + begun)
            places.append((item, k))
    out = torch.zeros(len(items), len(orders), n)
    words = torch.tensor([ids[0] for ids in digits], device=model.W_U.device)

    def work(indices: list[int]) -> None:
        residual, _ = prefill(model, [rows[i] for i in indices])
        scores = log_probs_at(
            final_hidden(model, residual[:, 0]),
            model.W_U,
            words.expand(len(indices), -1),
            **readout(model),
        ).cpu()
        for i, row in zip(indices, scores, strict=True):
            item, k = places[i]
            require_finite(row, f"a score of vignette {item}", model, lambda: [rows[i]])  # noqa: B023
            out[item, k, orders[k]] = row

    in_batches(length_batches([len(row) for row in rows], 2 * config.batch_size), work, "the probe")
    return out
