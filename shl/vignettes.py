"""The moral-foundation probe: a forced choice over seven readings of short vignettes.

Two styles behind one result. *Completion*, for models without a chat template: three stems are
each continued by seven options, whole options are scored, and each option's mean over the
vignettes under base is subtracted (its prior). *Digits*, for chat models: the options are
numbered, in two opposite orders, and the digit is scored. Both end as probabilities renormalised
over the seven options.
"""

from weakref import WeakKeyDictionary

import numpy as np
from transformer_lens import HookedTransformer

from shl.config import EvalConfig
from shl.errors import check
from shl.evaluation import Evaluation, logsumexp
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
    prior = base.mean(0, keepdims=True) if style == "completion" else np.zeros((1, 1, 1))
    base_mass = np.exp(logsumexp(base)).mean(0)[:, 0]
    labels = tuple(v.foundation for v in vignettes())
    return Evaluation(style, labels, log_probs, prior, base_mass)


def _read(
    model: HookedTransformer, style: str, persona: str | None, config: EvalConfig
) -> np.ndarray:
    read = read_completions if style == "completion" else read_digits
    scores = read(model, vignettes(), persona, config).double().numpy()
    check(bool(np.isfinite(scores).all()), "a vignette's score is not finite.")
    return scores
