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

from shl.attention import KeyValues
from shl.axes import DATA
from shl.config import FOUNDATIONS, EvalConfig
from shl.errors import check
from shl.hooks import handles_on, suspended
from shl.kl import log_probs_at
from shl.sites import final_hidden
from shl.stats import bootstrap
from shl.tokens import Prompt, encode, encode_text, is_chat, length_batches, pad_left


@dataclass(frozen=True)
class Vignette:
    """One short scene in the third person, and the foundation that it breaks."""

    foundation: str
    text: str


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What the probe read, per vignette and in sum.

    `log_probs` is `[item, asked, option]`: nats, raw, one slice per stem (or per order);
    `log_p` is `[item, option]`: log-probabilities renormalised over the options after
    calibration; `mass` is the probability of any valid answer, per `asked`.

    Example:
        >>> from shl.tiny import tiny_gemma
        >>> result = evaluate(tiny_gemma())
        >>> sorted(result.nats) == sorted(FOUNDATIONS), result.coherence
        (True, 1.0)
    """

    style: str
    labels: tuple[str, ...]
    log_probs: np.ndarray
    prior: np.ndarray
    base_mass: np.ndarray

    @property
    def log_p(self) -> np.ndarray:
        """`[item, option]`, nats: calibrated, averaged over `asked`, renormalised."""
        return _log_softmax((self.log_probs - self.prior).mean(1))

    @property
    def log_p_each(self) -> np.ndarray:
        """`[item, asked, option]`, nats: the same for each stem or order alone."""
        return _log_softmax(self.log_probs - self.prior)

    @property
    def nats(self) -> dict[str, float]:
        """Log of the mean probability over all vignettes, per foundation."""
        return dict(zip(FOUNDATIONS, map(float, nats_of(self.log_p)), strict=True))

    @property
    def mass(self) -> np.ndarray:
        """`[asked]`: mean probability of any valid answer."""
        return np.exp(_logsumexp(self.log_probs)).mean(0)[:, 0]

    @property
    def coherence(self) -> float:
        """Valid-answer mass relative to base, geometric mean over stems or orders."""
        return float(np.exp(np.mean(np.log(self.mass) - np.log(self.base_mass))))

    @property
    def accuracy(self) -> float:
        """Share of vignettes whose most probable option is the intended foundation."""
        return float((self.log_p.argmax(1) == self.intended).mean())

    @property
    def confusion(self) -> np.ndarray:
        """Counts `[intended, chosen]` in the order of the foundations."""
        table = np.zeros((len(FOUNDATIONS),) * 2, dtype=int)
        np.add.at(table, (self.intended, self.log_p.argmax(1)), 1)
        return table

    @property
    def intended(self) -> np.ndarray:
        """`[item]`: index of the foundation that each vignette was written for."""
        return np.array([FOUNDATIONS.index(label) for label in self.labels])

    def shift(self, base: "Evaluation") -> dict[str, float]:
        """Difference of `nats` to another reading of the same vignettes."""
        return {name: value - base.nats[name] for name, value in self.nats.items()}

    def shift_interval(
        self, base: "Evaluation", foundation: str, config: EvalConfig | None = None
    ) -> tuple[float, float]:
        """Bootstrap interval of the shift, paired by vignette."""
        config = config or EvalConfig()
        k = FOUNDATIONS.index(foundation)
        pairs = np.stack([np.exp(self.log_p[:, k]), np.exp(base.log_p[:, k])], 1)
        return bootstrap(
            pairs,
            lambda x: float(np.log(x[:, 0].mean()) - np.log(x[:, 1].mean())),
            resamples=config.bootstrap,
            confidence=config.confidence,
        )

    def centred_shift(self, base: "Evaluation") -> dict[str, float]:
        """Mean per-vignette shift of the log-ratio to the options' mean: each vignette counts
        alike, however small its probability."""
        moved = _centred(self.log_p) - _centred(base.log_p)
        return dict(zip(FOUNDATIONS, map(float, moved.mean(0)), strict=True))

    def coherence_interval(self, config: EvalConfig | None = None) -> tuple[float, float]:
        """Bootstrap interval of `coherence` over vignettes, base held fixed."""
        config = config or EvalConfig()
        masses = np.exp(_logsumexp(self.log_probs))[:, :, 0]
        return bootstrap(
            masses,
            lambda x: float(np.exp(np.mean(np.log(x.mean(0)) - np.log(self.base_mass)))),
            resamples=config.bootstrap,
            confidence=config.confidence,
        )


def nats_of(log_p: np.ndarray) -> np.ndarray:
    """Log of the mean probability over items: `[item, option]` to `[option]`.

    Example:
        >>> import numpy as np
        >>> nats_of(np.log([[0.25, 0.75], [0.75, 0.25]])).round(3)
        array([-0.693, -0.693])
    """
    return np.log(np.exp(log_p).mean(0))


def selectivity(shift: Mapping[str, float], expected: Mapping[str, int]) -> float:
    """Mean expected-sign shift on the axis over the largest absolute shift off it.

    Example:
        >>> selectivity({"care": 1.0, "authority": -2.0, "social": 0.5}, {"care": 1})
        0.5
    """
    on = float(np.mean([sign * shift[name] for name, sign in expected.items()]))
    off = max((abs(value) for name, value in shift.items() if name not in expected), default=0.0)
    return on / off if off > 0 else float("inf")


def _logsumexp(x: np.ndarray) -> np.ndarray:
    top = x.max(-1, keepdims=True)
    return top + np.log(np.exp(x - top).sum(-1, keepdims=True))


def _log_softmax(x: np.ndarray) -> np.ndarray:
    return x - _logsumexp(x)


def _centred(log_p: np.ndarray) -> np.ndarray:
    return log_p - log_p.mean(-1, keepdims=True)


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


_BASE: "WeakKeyDictionary[HookedTransformer, dict[str, np.ndarray]]" = WeakKeyDictionary()


def evaluate(
    model: HookedTransformer, *, persona: str | None = None, config: EvalConfig | None = None
) -> Evaluation:
    """Read the probe on the model as it stands, hooks included.

    Base (this package's hooks suspended) is read once per model, for the prior and the coherence.

    Args:
        persona: put before each vignette (system turn of a chat model).

    Raises:
        ShlError: a score that is not finite.
    """
    config = config or EvalConfig()
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
    base_mass = np.exp(_logsumexp(base)).mean(0)[:, 0]
    labels = tuple(v.foundation for v in vignettes())
    return Evaluation(style, labels, log_probs, prior, base_mass)


def _read(
    model: HookedTransformer, style: str, persona: str | None, config: EvalConfig
) -> np.ndarray:
    read = _read_completions if style == "completion" else _read_digits
    scores = read(model, persona, config).double().numpy()
    check(bool(np.isfinite(scores).all()), "a vignette's score is not finite.")
    return scores


@torch.no_grad()
def _read_completions(model: HookedTransformer, persona: str | None, config: EvalConfig) -> Tensor:
    """`[item, stem, option]`: summed log-probabilities of whole options.

    A vignette is run once; each stem continues its cache, and each option that of the stem.
    """
    asked = probe_data()["completion"]
    assert isinstance(asked, list)
    stems = [encode_text(model, entry["stem"]) for entry in asked]
    options = [[encode_text(model, text) for text in entry["options"]] for entry in asked]
    before = f"{persona}\n\n" if persona else ""
    rows = [encode_text(model, before + v.text, bos=True) for v in vignettes()]
    out = torch.zeros(len(rows), len(stems), len(FOUNDATIONS))
    for items in length_batches([len(row) for row in rows], config.batch_size):
        batch = pad_left(model, [rows[i] for i in items])
        start = KeyValues.empty(model, len(items), batch.tokens.shape[1])
        _run(model, batch.tokens, batch.mask, start)
        for k, stem in enumerate(stems):
            # Stems go one by one: padding between a stem and its options would count towards
            # the sliding window.
            out[items, k] = _score_options(model, start, stem, options[k], len(items))
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
    last = _run(model, tokens, mask, kv)[:, -1]
    firsts = torch.tensor([option[0] for option in options], device=device)
    scores = log_probs_at(
        final_hidden(model, last), model.W_U, firsts.expand(items, -1), bias=model.b_U
    )
    # Every option but its last token is run, to predict the token after it.
    if any(len(option) > 1 for option in options):
        kv = kv.rows(each.repeat_interleave(len(options)), kv.length + max(map(len, options)) - 1)
        tokens, _ = _pad_right([option[:-1] for option in options], items, device)
        targets, real = _pad_right([option[1:] for option in options], items, device)
        residual = _run(model, tokens, real, kv)
        rest = torch.zeros(tokens.shape, device=device)
        rest[real.bool()] = log_probs_at(
            final_hidden(model, residual[real.bool()]),
            model.W_U,
            targets[real.bool()][:, None],
            bias=model.b_U,
        )[:, 0]
        scores = scores + rest.sum(1).view(scores.shape)
    return scores.cpu()


def _run(model: HookedTransformer, tokens: Tensor, mask: Tensor, kv: KeyValues) -> Tensor:
    return model(tokens, attention_mask=mask, past_kv_cache=kv, stop_at_layer=model.cfg.n_layers)


def _pad_right(
    rows: Sequence[Sequence[int]], times: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`rows`, padded on the right and repeated as a whole, and their mask."""
    width = max(map(len, rows))
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return tokens.repeat(times, 1), mask.repeat(times, 1)


@torch.no_grad()
def _read_digits(model: HookedTransformer, persona: str | None, config: EvalConfig) -> Tensor:
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
    for item, v in enumerate(vignettes()):
        for k, order in enumerate(orders):
            listed = "\n".join(f"{j + 1}. {asked['options'][o]}" for j, o in enumerate(order))
            text = asked["question"].format(vignette=v.text, options=listed)
            prefill = encode_text(model, asked["answer"])
            rows.append(encode(model, Prompt(text, persona)) + prefill)
            places.append((item, k))
    out = torch.zeros(len(vignettes()), len(orders), n)
    words = torch.tensor([ids[0] for ids in digits], device=model.W_U.device)
    for indices in length_batches([len(row) for row in rows], 2 * config.batch_size):
        batch = pad_left(model, [rows[i] for i in indices])
        residual = model(batch.tokens, attention_mask=batch.mask, stop_at_layer=model.cfg.n_layers)[
            :, -1
        ]
        scores = log_probs_at(
            final_hidden(model, residual), model.W_U, words.expand(len(indices), -1), bias=model.b_U
        ).cpu()
        for i, row in zip(indices, scores, strict=True):
            item, k = places[i]
            out[item, k, orders[k]] = row
    return out
