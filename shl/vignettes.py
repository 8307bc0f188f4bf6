"""The moral-foundation probe: a forced choice over seven readings of short vignettes.

Two styles behind one result. *Completion*, for models without a chat template: three stems are
each continued by seven options, whole options are scored, and each option's mean over the
vignettes under base is subtracted (its prior). *Digits*, for chat models: the options are
numbered, in two opposite orders, and the digit is scored. Both end as probabilities renormalised
over the seven options.
"""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np
from transformer_lens import HookedTransformer

from shl.config import FOUNDATIONS, EvalConfig
from shl.errors import check
from shl.evaluation import Evaluation, logsumexp, nats_of
from shl.hooks import handles_on, suspended
from shl.probes import read_completions, read_digits, vignettes
from shl.tokens import is_chat

_BASE: "WeakKeyDictionary[HookedTransformer, dict[str, np.ndarray]]" = WeakKeyDictionary()


def evaluate(
    model: HookedTransformer, *, persona: str | None = None, config: EvalConfig | None = None
) -> Evaluation:
    """Read the probe on the model as it stands, hooks included.

    Base (this package's hooks suspended) is read once per model, for the prior and the coherence.

    Args:
        persona: put before each vignette (system turn of a chat model).

    Raises:
        ShlError: a score that is not finite, or a hook with doses or a mask by row.

    Example:
        >>> from shl.tiny import tiny_gemma
        >>> evaluate(tiny_gemma()).coherence
        1.0
    """
    config = config or EvalConfig()
    for handle in handles_on(model):
        check(
            handle.rows is None,
            f"a hook has doses or a mask for {handle.rows} rows, the probe reads rows of its own.",
        )
    style = "digits" if is_chat(model) else "completion"
    fresh = model not in _BASE
    if fresh:
        with suspended(model):
            _BASE[model] = {"log_probs": _read(model, style, None, config)}
    base = _BASE[model]["log_probs"]
    # A reading of base that was taken just now, with nothing of ours on, is the answer itself.
    plain = fresh and persona is None and not handles_on(model)
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
    check(
        not unknown, f"the labels name {unknown[:1]}, the foundations are {', '.join(FOUNDATIONS)}."
    )
    for scores in (log_probs, base):
        check(
            scores.ndim == 3 and scores.shape == (items, base.shape[1], len(FOUNDATIONS)),
            f"the scores have shape {scores.shape}, it must be ({items}, asked, 7).",
        )
        check(
            bool(((scores > -1e5) & (scores < 1e-3)).all()),
            f"the scores lie between {scores.min()} and {scores.max()}, log-probabilities must be "
            "between -1e5 and 0.",
        )
    prior = base.mean(0, keepdims=True) if style == "completion" else np.zeros((1, 1, 1))
    base_mass = np.exp(nats_of(logsumexp(base)[:, :, 0]))
    check(bool((base_mass > 0).all()), f"base gives valid answers a mass of {base_mass.min()}.")
    return Evaluation(style, labels, log_probs, prior, base_mass)


def remember_base(model: HookedTransformer, reading: Evaluation) -> None:
    """Take a reading of base that was made earlier instead of making it again.

    Raises:
        ShlError: a reading of another style or of other vignettes.

    Example:
        >>> from shl.tiny import tiny_gemma
        >>> model, again = tiny_gemma(), tiny_gemma()
        >>> base = evaluate(model)
        >>> remember_base(again, base)
        >>> float(evaluate(again).coherence)
        1.0
    """
    style = "digits" if is_chat(model) else "completion"
    labels = tuple(v.foundation for v in vignettes())
    check(
        (reading.style, reading.labels) == (style, labels),
        f"the reading of base has style {reading.style!r} and {len(reading.labels)} vignettes, "
        f"this model is read in style {style!r} on {len(labels)}.",
    )
    _BASE[model] = {"log_probs": reading.log_probs}


def _read(
    model: HookedTransformer, style: str, persona: str | None, config: EvalConfig
) -> np.ndarray:
    read = read_completions if style == "completion" else read_digits
    return read(model, vignettes(), persona, config).double().numpy()
