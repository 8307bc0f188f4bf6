"""The moral-foundation probe: a forced choice over seven readings of short vignettes.

Two styles behind one result. *Completion*, for models without a chat template: three stems are
each continued by seven options, whole options are scored, and each option's mean over the
vignettes under base is subtracted (its prior). *Digits*, for chat models: the options are
numbered, in two opposite orders, and the digit is scored. Both end as probabilities renormalised
over the seven options.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from shl.config import FOUNDATIONS, EvalConfig
from shl.fast import KVCache, is_hooked
from shl.hooks.fingerprint import weights_hash
from shl.hooks.handle import handles_on, unhooked
from shl.hooks.sites import final_hidden, readout
from shl.kl import log_probs_at
from shl.measure.evaluation import Evaluation, log_mass, nats_of
from shl.models.generate import prefill, run
from shl.models.nan_checks import require_finite
from shl.models.tokens import Prompt, encode, encode_text, is_chat, length_batches
from shl.utils.errors import in_batches, require
from shl.utils.files import DATA


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
    start: KVCache,
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
    require(
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


_BASE: "WeakKeyDictionary[HookedTransformer, tuple[str, np.ndarray]]" = WeakKeyDictionary()
"""Base's raw scores, with the hash of the weights that they were read on."""


def evaluate(
    model: HookedTransformer, *, persona: str | None = None, config: EvalConfig | None = None
) -> Evaluation:
    """Read the probe on the model as it stands, hooks included.

    Base, without any hook, is read once per model and weights, for the prior and the coherence.

    Args:
        persona: put before each vignette (system turn of a chat model).

    Raises:
        ShlError: a score that is not finite, or a hook with doses or a mask by row.

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> evaluate(tiny_gemma()).coherence
        1.0
    """
    config = config or EvalConfig()
    for handle in handles_on(model):
        require(
            handle.rows is None,
            f"a hook has doses or a mask for {handle.rows} rows, the probe reads rows of its own.",
        )
    style = "digits" if is_chat(model) else "completion"
    weights = weights_hash(model)
    known, base = _BASE.get(model, ("", None))
    fresh = base is None or known != weights
    if fresh:
        with unhooked(model):
            base = _read(model, style, None, config)
        _BASE[model] = weights, base
    assert base is not None
    # Base's own reading was taken just now, if no hook is on.
    plain = fresh and persona is None and not any(map(is_hooked, model.modules()))
    log_probs = base if plain else _read(model, style, persona, config)
    return reading(style, log_probs, base)


def reading(
    style: str, log_probs: np.ndarray, base: np.ndarray, labels: Sequence[str] | None = None
) -> Evaluation:
    """An `Evaluation` from raw scores `[item, asked, option]` of a stage and of base, in nats.

    Args:
        labels: the foundation that each item was written for; those of the built-in vignettes
            unless given.

    Raises:
        ShlError: other shapes than these items have, or a label that is no foundation.

    Example:
        >>> import numpy as np
        >>> base = np.full((2, 1, 7), -2.0)
        >>> reading("digits", base - 1, base, ("care", "social")).coherence.__round__(3)
        0.368
    """
    labels = tuple(v.foundation for v in vignettes()) if labels is None else tuple(labels)
    items = len(labels)
    unknown = sorted(set(labels) - set(FOUNDATIONS))
    require(
        not unknown, f"the labels name {unknown[:1]}, the foundations are {', '.join(FOUNDATIONS)}."
    )
    for scores in (log_probs, base):
        require(
            scores.ndim == 3 and scores.shape == (items, base.shape[1], len(FOUNDATIONS)),
            f"the scores have shape {scores.shape}, it must be ({items}, asked, 7).",
        )
        require(
            bool(((scores > -1e5) & (scores < 1e-3)).all()),
            f"the scores lie between {scores.min()} and {scores.max()}, log-probabilities must be "
            "between -1e5 and 0.",
        )
    prior = base.mean(0, keepdims=True) if style == "completion" else np.zeros((1, 1, 1))
    base_mass = np.exp(nats_of(log_mass(base)))
    require(bool((base_mass > 0).all()), f"base gives valid answers a mass of {base_mass.min()}.")
    return Evaluation(style, labels, log_probs, prior, base_mass)


def remember_base(model: HookedTransformer, reading: Evaluation) -> None:
    """Take a reading of base that was made earlier instead of making it again.

    Raises:
        ShlError: a reading of another style or of other vignettes.

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> model, again = tiny_gemma(), tiny_gemma()
        >>> base = evaluate(model)
        >>> remember_base(again, base)
        >>> float(evaluate(again).coherence)
        1.0
    """
    style = "digits" if is_chat(model) else "completion"
    labels = tuple(v.foundation for v in vignettes())
    require(
        (reading.style, reading.labels) == (style, labels),
        f"the reading of base has style {reading.style!r} and {len(reading.labels)} vignettes, "
        f"this model is read in style {style!r} on {len(labels)}.",
    )
    _BASE[model] = weights_hash(model), reading.log_probs


def _read(
    model: HookedTransformer, style: str, persona: str | None, config: EvalConfig
) -> np.ndarray:
    read = read_completions if style == "completion" else read_digits
    return read(model, vignettes(), persona, config).double().numpy()
