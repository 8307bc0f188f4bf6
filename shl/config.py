"""Frozen settings, one dataclass per stage, checked when they are made.

The defaults are the recommended method. Each field's docstring is also its `--help` text.
"""

import math
import sys
from dataclasses import dataclass, field
from typing import Literal

from shl.utils.errors import ShlError, require

LINEAR_SITES = ("q", "k", "v", "o", "gate", "up", "down")
SITE_KINDS = (*LINEAR_SITES, "resid")
FOUNDATIONS = ("care", "fairness", "loyalty", "authority", "sanctity", "liberty", "social")


def _between(name: str, value: float, low: float, high: float = math.inf) -> None:
    allowed = f"between {low:g} and {high:g}" if high < math.inf else f"at least {low:g}"
    largest = min(high, sys.float_info.max)  # neither infinity nor an integer beyond floats
    require(low <= value <= largest, f"{name} is {value!r}, it must be {allowed}.")


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    listed = ", ".join(map(repr, allowed))
    require(value in allowed, f"{name} is {value!r}, it must be one of {listed}.")


def quantile_of(aggregate: str) -> float | None:
    """The quantile that `pNN` names, as a share, or None for another aggregate.

    Example:
        >>> quantile_of("p95"), quantile_of("p99.9"), quantile_of("rmse")
        (0.95, 0.9990000000000001, None)
    """
    if not aggregate.startswith("p"):
        return None
    try:
        percent = float(aggregate[1:])
    except ValueError:
        return None
    return percent / 100 if 0 <= percent <= 100 else None


@dataclass(frozen=True)
class VectorConfig:
    """How the steering vector is read: mean difference at the assistant tag.

    Raises:
        ShlError: a value out of its range; the sentence names it and what is allowed.

    Example:
        >>> VectorConfig(contexts=32).layers is None  # the middle third
        True
    """

    contexts: int = 64
    """Everyday questions that both personas are asked [count, from the axis file]."""
    layers: tuple[int, ...] | None = None
    """Layers of the band, or None for the middle third of the model [layer indices]."""
    batch_size: int = 16
    """Prompts in one forward pass [count]."""
    against: Literal["opposite", "no_persona"] = "opposite"
    """What the positive persona is contrasted with: its opposite, or the question alone."""
    direction: Literal["contrast", "random"] = "contrast"
    """contrast = the axis; random = the control: one normal direction per layer, the same in every
    round, scaled until it takes the student as far (mean KL per token) as the axis's vector."""

    def __post_init__(self) -> None:
        _between("contexts", self.contexts, 1)
        _between("batch_size", self.batch_size, 1)
        _one_of("against", self.against, ("opposite", "no_persona"))
        _one_of("direction", self.direction, ("contrast", "random"))
        require(self.layers is None or len(self.layers) > 0, "layers is empty, name at least one.")


@dataclass(frozen=True)
class GenerateConfig:
    """How completions are sampled. No repetition penalty: loops must stay visible.

    Raises:
        ShlError: a value out of its range; the sentence names it and what is allowed.

    Example:
        >>> GenerateConfig(temperature=0).max_new_tokens
        64
    """

    max_new_tokens: int = 64
    """Longest completion [tokens]."""
    min_new_tokens: int = 0
    """No turn end is accepted before this many tokens [tokens]."""
    temperature: float = 1.0
    """Softmax temperature; 0 is greedy."""
    top_k: int = 64
    """Sample among this many most likely tokens; 0 is all of them [tokens]."""
    top_p: float = 0.95
    """Sample within this probability mass, after top_k [share]."""
    batch_size: int = 48
    """Rows decoded together [count]."""

    def __post_init__(self) -> None:
        _between("max_new_tokens", self.max_new_tokens, 1)
        _between("min_new_tokens", self.min_new_tokens, 0, self.max_new_tokens)
        _between("temperature", self.temperature, 0)
        _between("top_k", self.top_k, 0)
        _between("top_p", self.top_p, 0, 1)
        require(self.top_p > 0, f"top_p is {self.top_p!r}, it must be above 0.")
        _between("batch_size", self.batch_size, 1)


@dataclass(frozen=True)
class FilterConfig:
    """When a completion is dropped. Every rule that fires is recorded.

    Raises:
        ShlError: a value out of its range; the sentence names it and what is allowed.

    Example:
        >>> FilterConfig(min_words=4).max_tail_perplexity
        30.0
    """

    min_words: int = 8
    """Fewer words than this are too short to judge [words]."""
    max_tail_perplexity: float = 30.0
    """Above this base perplexity of the last quarter a text is incoherent [exp nats per token]."""
    min_perplexity: float = 1.6
    """Below this base perplexity of the whole or of the last quarter it is too predictable
    [exp nats per token]."""
    max_word_share: float = 0.2
    """Largest share of words that the most frequent word 2-, 3- or 4-gram may cover [share]."""
    max_char_share: float = 0.25
    """Largest share of characters that the most frequent 3- to 12-character n-gram may cover
    [share]."""
    max_run: int = 3
    """Longest run of one and the same word [count]."""
    min_compression: float = 0.42
    """Below this ratio of zlib-compressed to raw bytes a text is too compressible [ratio]."""
    min_real_words: float = 0.8
    """Smallest share of words that look like words: alphabetic, with a vowel, of sane length,
    not in capitals [share]."""
    min_distinct_words: float = 0.35
    """Smallest ratio of distinct to all words [share]."""
    batch_size: int = 16
    """Completions scored under base in one pass [count]."""

    def __post_init__(self) -> None:
        _between("min_words", self.min_words, 0)
        _between("max_tail_perplexity", self.max_tail_perplexity, 1)
        _between("min_perplexity", self.min_perplexity, 1, self.max_tail_perplexity)
        for name in (
            "max_word_share",
            "max_char_share",
            "min_compression",
            "min_real_words",
            "min_distinct_words",
        ):
            _between(name, getattr(self, name), 0, 1)
        _between("max_run", self.max_run, 1)
        _between("batch_size", self.batch_size, 1)


@dataclass(frozen=True)
class DoseConfig:
    """The walk over the dose multiplier kappa (walk-C).

    Raises:
        ShlError: a value out of its range; the sentence names it and what is allowed.

    Example:
        >>> DoseConfig(rungs=3).alpha
        1.5
    """

    alpha: float = 1.5
    """Nominal dose: the vector is added kappa * alpha times [multiples of the raw vector]; 0,
    with the walk off, leaves the student unsteered."""
    walk: bool = True
    """Probe a ladder of doses each round; off: every round uses kappa = 1."""
    kappa_min: float = 0.2
    """Lowest kappa that is tried [multiplier]."""
    rungs: int = 5
    """Doses on the ladder, evenly spaced in log kappa from 1 down to kappa_min [count]."""
    probe_size: int = 8
    """Completions per rung; all rungs are generated as rows of the same batches [count]."""
    target_survival: float = 0.75
    """Share of probes that must survive the filter [share]."""
    min_train: int = 32
    """Survivors that a round needs [count]."""
    batch_size: int = 32
    """Completions generated at a time at the chosen dose [count]."""
    max_batches: int = 6
    """Batches after which a round with too few survivors stops [count]."""

    def __post_init__(self) -> None:
        require(math.isfinite(self.alpha), f"alpha is {self.alpha!r}, it must be finite.")
        require(
            self.alpha != 0 or not self.walk,
            "alpha is 0, where a walk over doses has nothing to walk; set walk to False, or alpha "
            "to something else.",
        )
        _between("kappa_min", self.kappa_min, 0, 1)
        require(self.kappa_min > 0, f"kappa_min is {self.kappa_min!r}, it must be above 0.")
        _between("rungs", self.rungs, 1)
        _between("probe_size", self.probe_size, 1)
        _between("target_survival", self.target_survival, 0, 1)
        _between("min_train", self.min_train, 1)
        _between("batch_size", self.batch_size, 1)
        _between("max_batches", self.max_batches, 1)


@dataclass(frozen=True)
class HealConfig:
    """One round of training: loss = NLL + lam * relu(D - tau), per completion.

    Raises:
        ShlError: a value out of its range; the sentence names it and what is allowed.

    Example:
        >>> HealConfig(rank=4, sites=("o", "down")).tau
        0.5
    """

    rank: int = 16
    """Inner width r of each adapter matrix pair [count]."""
    lora_alpha: float = 16.0
    """The adapter's update is scaled by lora_alpha / rank."""
    sites: tuple[str, ...] = LINEAR_SITES
    """Where the adapter sits: any of q, k, v, o, gate, up, down, resid."""
    layers: tuple[int, ...] | None = None
    """Layers that carry the adapter, or None for all but the first and last sixth."""
    epochs: int = 2
    """Passes over the kept completions [count]."""
    lr: float = 4e-4
    """AdamW's learning rate, after a warm-up over the first tenth of the steps."""
    batch_size: int = 4
    """Completions per optimiser step [count]."""
    rows: int | None = None
    """Of these, completions that go through the model at a time, None for all: fewer take less
    memory and give the same gradient but for the last bits [count]."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this 2-norm."""
    divergence: Literal["kl_rev", "kl_fwd", "none"] = "kl_rev"
    """kl_rev = KL(student || reference), kl_fwd = KL(reference || student), none = plain NLL."""
    aggregate: str = "rmse"
    """How a completion's per-token divergences become D: mean, rmse, max or pNN (p95)."""
    reference: Literal["base", "prev"] = "base"
    """base = the untouched model (a leash), prev = the student entering the round (a trust
    region)."""
    tau: float = 0.5
    """D up to here is free [nats]."""
    lam: float = 1.0
    """Weight of the barrier at the start of round 0 [1]."""
    lam_final: float | None = None
    """Weight at the last round, None for no change over rounds [1]."""
    lam_schedule: Literal["linear", "power"] = "linear"
    """linear = from lam to lam_final; power = lam * (round + 1) ** lam_power."""
    lam_power: float = -0.5
    """Exponent of the power schedule."""
    calibrate: bool = True
    """Raise lam while D stays above tau (and let it fall back to the schedule's value), so that
    the barrier binds."""
    calibrate_rate: float = 0.15
    """Step of that dual ascent: log lam moves by at most this per optimiser step."""
    lam_max: float = 64.0
    """Ceiling of the calibrated weight [1]."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay on A and B [1/step, times lr]."""
    sv_penalty: float = 0.0
    """Weight of the mean squared largest singular value of each scaled B A."""

    def __post_init__(self) -> None:
        _between("rank", self.rank, 1)
        _between("lora_alpha", self.lora_alpha, 0)
        require(len(self.sites) > 0, "sites is empty, name at least one.")
        for site in self.sites:
            _one_of("a site", site, SITE_KINDS)
        require(len(set(self.sites)) == len(self.sites), f"sites {self.sites} names one twice.")
        _between("epochs", self.epochs, 1)
        _between("batch_size", self.batch_size, 1)
        if self.rows is not None:
            _between("rows", self.rows, 1, self.batch_size)
        for name in ("lr", "tau", "lam", "weight_decay", "sv_penalty", "calibrate_rate"):
            _between(name, getattr(self, name), 0)
        _between("max_grad_norm", self.max_grad_norm, 0)
        require(self.max_grad_norm > 0, "max_grad_norm is 0, it must be above 0.")
        _one_of("divergence", self.divergence, ("kl_rev", "kl_fwd", "none"))
        _one_of("reference", self.reference, ("base", "prev"))
        _one_of("lam_schedule", self.lam_schedule, ("linear", "power"))
        if self.lam_final is not None:
            _between("lam_final", self.lam_final, 0)
            require(
                self.lam_schedule == "linear",
                "lam_final is set but lam_schedule is 'power', which ends where lam_power says.",
            )
        _between("lam_max", self.lam_max, max(self.lam, self.lam_final or 0.0))
        require(
            self.lam > 0 or not self.calibrate or self.divergence == "none",
            "lam is 0, from where calibration cannot raise it; give lam above 0 or calibrate "
            "False.",
        )
        if self.aggregate not in ("mean", "rmse", "max") and quantile_of(self.aggregate) is None:
            raise ShlError(
                f"aggregate is {self.aggregate!r}, it must be 'mean', 'rmse', 'max' or 'pNN' "
                "with NN between 0 and 100."
            )

    def lam_at(self, index: int, rounds: int) -> float:
        """The schedule's barrier weight in round `index` of `rounds`.

        Example:
            >>> HealConfig(lam=1.0, lam_final=0.3).lam_at(2, 3)
            0.3
        """
        if self.lam_schedule == "power":
            return self.lam * (index + 1) ** self.lam_power
        if self.lam_final is None or rounds == 1:
            return self.lam
        share = index / (rounds - 1)
        return (1 - share) * self.lam + share * self.lam_final


@dataclass(frozen=True)
class EvalConfig:
    """How a model is measured on the vignettes, and on free samples.

    Raises:
        ShlError: a value out of its range; the sentence names it and what is allowed.

    Example:
        >>> EvalConfig(samples=4).confidence
        0.95
    """

    bootstrap: int = 1000
    """Resamples of the vignettes behind each interval [count]."""
    confidence: float = 0.95
    """Coverage of the intervals [share]."""
    samples: int = 16
    """Free, unsteered answers to the axis's prompts per stage [count]."""
    batch_size: int = 16
    """Vignettes scored in one pass [count]."""

    def __post_init__(self) -> None:
        _between("bootstrap", self.bootstrap, 10)
        _between("confidence", self.confidence, 0.5, 0.999)
        _between("samples", self.samples, 1)
        _between("batch_size", self.batch_size, 1)


@dataclass(frozen=True)
class LoopConfig:
    """The whole study: rounds, seed, and the settings of each stage.

    Raises:
        ShlError: a value out of its range; the sentence names it and what is allowed.

    Example:
        >>> LoopConfig(rounds=2, heal=HealConfig(rank=4)).heal.rank
        4
    """

    rounds: int = 3
    """Rounds of steer, filter, heal [count]."""
    seed: int = 42
    """All randomness follows from it."""
    prompted: bool = False
    """The positive persona is in the prompt while the completions are made; what is learnt from
    them is the answer to the question alone. With dose.alpha 0: distilled from prompting."""
    vector: VectorConfig = field(default_factory=VectorConfig)
    """The steering vector."""
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    """Sampling."""
    filter: FilterConfig = field(default_factory=FilterConfig)
    """What is dropped."""
    dose: DoseConfig = field(default_factory=DoseConfig)
    """The dose walk."""
    heal: HealConfig = field(default_factory=HealConfig)
    """Training."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Measuring."""

    def __post_init__(self) -> None:
        _between("rounds", self.rounds, 1)
        _between("seed", self.seed, 0, 2**31 - 1)
