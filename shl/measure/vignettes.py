"""The moral-foundation probe: a forced choice between seven foundations for short vignettes.

Two styles give one kind of result, probabilities renormalised over the seven options.
*Completion*, for models without a chat template: three stems are each continued by seven options,
whole options are scored, and each option's mean over the vignettes under base is subtracted (its
prior). *Digits*, for chat models: the options are numbered, in two opposite orders, and the digit
is scored.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from shl.config import FOUNDATIONS, EvalConfig
from shl.fast import is_hooked
from shl.hooks.fingerprint import weights_hash
from shl.hooks.handle import handles_on, unhooked
from shl.measure.continuations import option_scores, predictions, score
from shl.measure.evaluation import Evaluation, log_mass, nats_of
from shl.models.generate import prefill, run
from shl.models.tokens import Prompt, encode, encode_text, is_chat, length_batches
from shl.utils.errors import in_batches, require
from shl.utils.files import DATA
from shl.utils.model import Model


@dataclass(frozen=True)
class Vignette:
    """A short scene in the third person, and the foundation that it violates."""

    foundation: str
    text: str


@cache
def vignettes() -> tuple[Vignette, ...]:
    """The built-in vignettes, 12 for each of the seven foundations.

    Example:
        >>> len(vignettes())
        84
    """
    table = tomllib.loads((DATA / "vignettes.toml").read_text("utf-8"))
    return tuple(Vignette(**entry) for entry in table["vignette"])


def first_vignettes(count: int) -> tuple[Vignette, ...]:
    """The first `count` of the built-in vignettes, of every seven one for each foundation.

    Raises:
        ShlError: there are not that many.

    Example:
        >>> len({v.foundation for v in first_vignettes(7)})
        7
    """
    every = vignettes()
    allowed = f"from 1 to {len(every)}"
    require(1 <= count <= len(every), f"{count} vignettes are asked for, it must be {allowed}.")
    return every[:count]


@cache
def probe_data() -> Mapping[str, Any]:
    """Stems, options and the digit question, from `data/probe.toml`."""
    return MappingProxyType(tomllib.loads((DATA / "probe.toml").read_text("utf-8")))


@torch.no_grad()
def read_completions(
    model: Model, items: Sequence[Vignette], persona: str | None, config: EvalConfig
) -> np.ndarray:
    """`[item, stem, option]`: summed log-probabilities of whole options.

    A vignette is run once; each stem continues its cache, and each option that of the stem.
    """
    questions = probe_data()["completion"]
    stems = [encode_text(model, entry["stem"]) for entry in questions]
    options = [[encode_text(model, text) for text in entry["options"]] for entry in questions]
    before = f"{persona}\n\n" if persona else ""
    rows = [encode_text(model, before + v.text, bos=True) for v in items]
    after = max(
        len(stem) + len(option) - 1
        for stem, texts in zip(stems, options, strict=True)
        for option in texts
    )
    parts = []

    def work(chosen: list[int]) -> None:
        _, start = prefill(model, [rows[i] for i in chosen], reserve=after)
        each, found = torch.arange(len(chosen), device=model.W_U.device), []
        for k, stem in enumerate(stems):
            # Stems go one by one: padding between a stem and its options would count towards
            # the sliding window.
            kv = start.rows(each, start.length + len(stem))
            tokens = torch.tensor([stem] * len(chosen), device=each.device)
            last = run(model, tokens, torch.ones_like(tokens), kv)[:, -1]
            part = predictions(model, last, kv, [options[k]] * len(chosen))
            found.append(part.of_rows([i * len(stems) + k for i in chosen]))
        parts.extend(found)

    in_batches(length_batches([len(row) for row in rows], config.batch_size), work, "the probe")
    texts = [[*row, *stem] for row in rows for stem in stems]
    scores = score(model, parts, texts, "a score of a stem")
    return scores.reshape(len(rows), len(stems), -1)


@torch.no_grad()
def read_digits(
    model: Model, items: Sequence[Vignette], persona: str | None, config: EvalConfig
) -> np.ndarray:
    """`[item, order, option]`: log-probability of the option's digit as the answer."""
    data = probe_data()["digits"]
    n = len(FOUNDATIONS)
    digits = [encode_text(model, str(k + 1)) for k in range(n)]
    require(
        all(len(ids) == 1 for ids in digits),
        "the tokenizer splits a single digit, the digit probe needs one token each.",
    )
    answer = encode_text(model, data["answer"])
    rows = []
    for v in items:
        for options in (data["options"], data["options"][::-1]):
            listed = "\n".join(f"{k + 1}. {option}" for k, option in enumerate(options))
            text = data["question"].format(vignette=v.text, options=listed)
            rows.append(encode(model, Prompt(text, persona)) + answer)
    # Both orders of the options follow the same vignette.
    size = 2 * config.batch_size
    scores = option_scores(model, rows, [digits] * len(rows), batch_size=size, group=2)
    scores = scores.reshape(len(items), 2, n)
    scores[:, 1] = scores[:, 1, ::-1]
    return scores


_BASE: "WeakKeyDictionary[Model, tuple[tuple[str, int], np.ndarray]]" = WeakKeyDictionary()
"""Raw scores of base, with the hash of its weights and the number of vignettes."""


def evaluate(
    model: Model, *, persona: str | None = None, config: EvalConfig | None = None
) -> Evaluation:
    """Evaluate the model on `config.vignettes` of the vignettes, hooks included.

    Base, without any hook, is measured once per model and weights, for the prior and the coherence.

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
            f"a hook has doses or a mask for {handle.rows} rows, the probe has rows of its own.",
        )
    key = weights_hash(model), config.vignettes
    known, base = _BASE.get(model, (("", 0), None))
    fresh = base is None or known != key
    if fresh:
        with unhooked(model):
            base = _read(model, None, config)
        _BASE[model] = key, base
    assert base is not None
    # Without hooks and persona, the scores of base that were computed just now are the result.
    plain = fresh and persona is None and not any(map(is_hooked, model.modules()))
    log_probs = base if plain else _read(model, persona, config)
    return reading(_style(model), log_probs, base, _labels(config.vignettes))


def reading(
    style: str, log_probs: np.ndarray, base: np.ndarray, labels: Sequence[str] | None = None
) -> Evaluation:
    """An `Evaluation` from raw scores `[item, paraphrase, option]` of a stage and of base, in nats.

    Args:
        labels: the foundation that each item was written for; default those of as many vignettes.

    Raises:
        ShlError: a shape that does not fit the labels, a score that is no log-probability, or a
            label that is no foundation.

    Example:
        >>> import numpy as np
        >>> base = np.full((2, 1, 7), -2.0)
        >>> reading("digits", base - 1, base, ("care", "social")).coherence.__round__(3)
        0.368
    """
    labels = _labels(len(base)) if labels is None else tuple(labels)
    unknown = sorted(set(labels) - set(FOUNDATIONS))
    allowed = ", ".join(FOUNDATIONS)
    require(not unknown, f"the labels name {unknown[:1]}, the foundations are {allowed}.")
    for scores in (log_probs, base):
        require(
            scores.ndim == 3 and scores.shape == (len(labels), base.shape[1], len(FOUNDATIONS)),
            f"the scores have shape {scores.shape}, it must be ({len(labels)}, paraphrase, 7).",
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


def remember_base(model: Model, reading: Evaluation) -> None:
    """Use an earlier evaluation of base, on as many vignettes, instead of computing it again.

    Raises:
        ShlError: an evaluation in another style or on other vignettes.

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> model, again = tiny_gemma(), tiny_gemma()
        >>> base = evaluate(model)
        >>> remember_base(again, base)
        >>> float(evaluate(again).coherence)
        1.0
    """
    count = len(reading.labels)
    style, labels = _style(model), _labels(count)
    require(
        (reading.style, reading.labels) == (style, labels),
        f"the evaluation of base has style {reading.style!r} and {count} vignettes, for this model "
        f"it must have style {style!r}, with the foundations of as many built-in vignettes.",
    )
    _BASE[model] = (weights_hash(model), count), reading.log_probs


def _style(model: Model) -> str:
    return "digits" if is_chat(model) else "completion"


def _labels(count: int) -> tuple[str, ...]:
    return tuple(v.foundation for v in first_vignettes(count))


def _read(model: Model, persona: str | None, config: EvalConfig) -> np.ndarray:
    read = read_digits if is_chat(model) else read_completions
    return read(model, first_vignettes(config.vignettes), persona, config)
