"""Frozen settings, one dataclass per stage, validated on construction.

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
    """The quantile that `pNN` names, between 0 and 1, or None for another aggregate.

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
    """Extraction of the steering vector: mean difference at the assistant tag.

    Raises:
        ShlError: a value is out of range.

    Example:
        >>> VectorConfig(contexts=32).layers is None  # the middle third
        True
    """

    contexts: int = 64
    """Everyday questions put to both personas [count, from the axis file]."""
    layers: tuple[int, ...] | None = None
    """Layers to steer, or None for the middle third of the model [layer indices]."""
    batch_size: int = 16
    """Prompts in one forward pass [count]."""
    against: Literal["opposite", "no_persona"] = "opposite"
    """What the positive persona is contrasted with: the opposite persona, or the question alone."""
    direction: Literal["contrast", "random"] = "contrast"
    """contrast = the axis; random = a control: one Gaussian direction per layer, the same in every
    round, scaled to the same mean KL per token as the axis's vector."""

    def __post_init__(self) -> None:
        _between("contexts", self.contexts, 1)
        _between("batch_size", self.batch_size, 1)
        _one_of("against", self.against, ("opposite", "no_persona"))
        _one_of("direction", self.direction, ("contrast", "random"))
        require(self.layers is None or len(self.layers) > 0, "layers is empty, name at least one.")


@dataclass(frozen=True)
class GenerateConfig:
    """Sampling of completions. There is no repetition penalty, because loops must stay visible.

    Raises:
        ShlError: a value is out of range.

    Example:
        >>> GenerateConfig(temperature=0).max_new_tokens
        64
    """

    max_new_tokens: int = 64
    """Longest completion [tokens]."""
    min_new_tokens: int = 0
    """The turn cannot end before this many tokens [tokens]."""
    temperature: float = 1.0
    """Softmax temperature; 0 is greedy."""
    top_k: int = 64
    """Sample from this many most likely tokens; 0 is the whole vocabulary [tokens]."""
    top_p: float = 0.95
    """Sample from the most likely tokens with this total probability, after top_k [share]."""
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
    """Thresholds of the coherence filter. Every rule that fires is recorded.

    Raises:
        ShlError: a value is out of range.

    Example:
        >>> FilterConfig(min_words=4).max_tail_perplexity
        30.0
    """

    min_words: int = 8
    """Completions with fewer words are dropped [words]."""
    max_tail_perplexity: float = 30.0
    """A completion is incoherent if base's perplexity on its last quarter is above this
    [exp nats per token]."""
    min_perplexity: float = 1.6
    """A completion is too predictable if base's perplexity on it or on its last quarter is below
    this [exp nats per token]."""
    max_word_share: float = 0.2
    """Largest share of words that the most frequent word 2-, 3- or 4-gram may cover [share]."""
    max_char_share: float = 0.25
    """Largest share of characters that the most frequent 3- to 12-character n-gram may cover
    [share]."""
    max_run: int = 3
    """Longest run of the same word [count]."""
    min_compression: float = 0.42
    """Smallest ratio of zlib-compressed to raw bytes of a completion [ratio]."""
    min_real_words: float = 0.8
    """Smallest share of words that look like real ones: alphabetic, with a vowel, at most 18
    characters, no capitals inside [share]."""
    min_distinct_words: float = 0.35
    """Smallest ratio of distinct words to all words [share]."""
    batch_size: int = 16
    """Completions scored under base in one forward pass [count]."""

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
    """The search over the dose multiplier kappa (walk-C).

    Raises:
        ShlError: a value is out of range.

    Example:
        >>> DoseConfig(rungs=3).alpha
        1.5
    """

    alpha: float = 1.5
    """Nominal dose: kappa * alpha times the vector is added [multiples of the raw vector]. With 0
    and walk off the student is not steered."""
    walk: bool = True
    """Probe a ladder of doses in each round. If off, every round uses kappa = 1."""
    kappa_min: float = 0.2
    """Lowest kappa on the ladder [multiplier]."""
    rungs: int = 5
    """Doses on the ladder, evenly spaced in log kappa from 1 down to kappa_min [count]."""
    probe_size: int = 8
    """Completions per rung; all rungs are generated as rows of the same batches [count]."""
    target_survival: float = 0.75
    """Share of probes that must pass the filter [share]."""
    min_train: int = 32
    """Kept completions that a round needs for training [count]."""
    batch_size: int = 32
    """Completions per batch at the chosen dose [count]."""
    max_batches: int = 6
    """Largest number of batches that a round generates [count]."""

    def __post_init__(self) -> None:
        require(math.isfinite(self.alpha), f"alpha is {self.alpha!r}, it must be finite.")
        require(
            self.alpha != 0 or not self.walk,
            "alpha is 0, so all doses of the walk are equal; set walk to False or alpha to a "
            "non-zero number.",
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
        ShlError: a value is out of range.

    Example:
        >>> HealConfig(rank=4, sites=("o", "down")).tau
        0.5
    """

    rank: int = 16
    """Rank r of each adapter [count]."""
    lora_alpha: float = 16.0
    """The adapter's update is scaled by lora_alpha / rank."""
    sites: tuple[str, ...] = LINEAR_SITES
    """Sites of the adapter: any of q, k, v, o, gate, up, down, resid."""
    layers: tuple[int, ...] | None = None
    """Layers of the adapter, or None for all but the first and last sixth."""
    epochs: int = 2
    """Passes over the kept completions [count]."""
    lr: float = 4e-4
    """AdamW's learning rate, after a warm-up over the first tenth of the steps."""
    batch_size: int = 4
    """Completions per optimiser step [count]."""
    rows: int | None = None
    """Completions per forward pass within a step, None for all of them. Fewer take less memory and
    give the same gradient up to rounding [count]."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this 2-norm."""
    target: Literal["sampled", "soft"] = "sampled"
    """sampled = NLL of the sampled tokens, soft = KL(teacher || student), where the teacher is the
    steered student that enters the round, on the same tokens."""
    positions: Literal["completion", "all"] = "completion"
    """Tokens that are learnt: those of the completion, or those of the prompt too and the end of the
    turn; all needs the soft target."""
    clip: float | None = None
    """With the soft target: a token whose teacher has a KL to the reference above this is moved back
    towards the unsteered student, so that it has about this; None for no limit [nats]."""
    divergence: Literal["kl_rev", "kl_fwd", "none"] = "kl_rev"
    """kl_rev = KL(student || reference), kl_fwd = KL(reference || student), none = plain NLL."""
    aggregate: str = "rmse"
    """How a completion's per-token divergences become D: mean, rmse, max or pNN (p95)."""
    reference: Literal["base", "prev"] = "base"
    """base = the original model, prev = the student at the start of the round (a trust region)."""
    tau: float = 0.5
    """Threshold of the barrier: D up to tau has no penalty [nats]."""
    lam: float = 1.0
    """Weight of the barrier at the start of round 0 [1]."""
    lam_final: float | None = None
    """Weight at the last round, None for the same weight in all rounds [1]."""
    lam_schedule: Literal["linear", "power"] = "linear"
    """linear = from lam to lam_final; power = lam * (round + 1) ** lam_power."""
    lam_power: float = -0.5
    """Exponent of the power schedule."""
    calibrate: bool = True
    """Raise lam by dual ascent while D is above tau, and lower it to no less than the schedule's
    value while D is below."""
    calibrate_rate: float = 0.15
    """Step size of the dual ascent: the largest change of log lam per optimiser step."""
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
        _one_of("target", self.target, ("sampled", "soft"))
        _one_of("positions", self.positions, ("completion", "all"))
        for name, default in (("positions", "completion"), ("clip", None)):
            require(
                self.target == "soft" or getattr(self, name) == default,
                f"{name} is {getattr(self, name)!r}, which needs target 'soft'.",
            )
        if self.clip is not None:
            _between("clip", self.clip, 0)
            require(self.clip > 0, "clip is 0, it must be above 0.")
        _one_of("divergence", self.divergence, ("kl_rev", "kl_fwd", "none"))
        _one_of("reference", self.reference, ("base", "prev"))
        _one_of("lam_schedule", self.lam_schedule, ("linear", "power"))
        if self.lam_final is not None:
            _between("lam_final", self.lam_final, 0)
            require(
                self.lam_schedule == "linear",
                "lam_final is set but lam_schedule is 'power', whose last weight follows from "
                "lam_power.",
            )
        _between("lam_max", self.lam_max, max(self.lam, self.lam_final or 0.0))
        require(
            self.lam > 0 or not self.calibrate or self.divergence == "none",
            "lam is 0, which calibration cannot raise; set lam above 0 or calibrate to False.",
        )
        if self.aggregate not in ("mean", "rmse", "max") and quantile_of(self.aggregate) is None:
            raise ShlError(
                f"aggregate is {self.aggregate!r}, it must be 'mean', 'rmse', 'max' or 'pNN' "
                "with NN between 0 and 100."
            )

    def lam_at(self, index: int, rounds: int) -> float:
        """The scheduled barrier weight in round `index` of `rounds`.

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
    """Measurement of a model on the vignettes and on free samples.

    Raises:
        ShlError: a value is out of range.

    Example:
        >>> EvalConfig(samples=4).confidence
        0.95
    """

    bootstrap: int = 1000
    """Bootstrap resamples of the vignettes per interval [count]."""
    confidence: float = 0.95
    """Coverage of the intervals [share]."""
    samples: int = 16
    """Unsteered answers to the axis's prompts, sampled at each stage [count]."""
    batch_size: int = 16
    """Vignettes scored in one forward pass [count]."""

    def __post_init__(self) -> None:
        _between("bootstrap", self.bootstrap, 10)
        _between("confidence", self.confidence, 0.5, 0.999)
        _between("samples", self.samples, 1)
        _between("batch_size", self.batch_size, 1)


@dataclass(frozen=True)
class LoopConfig:
    """Settings of the whole study: rounds, seed, and one config per stage.

    Raises:
        ShlError: a value is out of range.

    Example:
        >>> LoopConfig(rounds=2, heal=HealConfig(rank=4)).heal.rank
        4
    """

    rounds: int = 3
    """Rounds of steer, filter, heal [count]."""
    seed: int = 42
    """Seed of all random numbers."""
    prompted: bool = False
    """Put the positive persona into the prompt when completions are generated, and train on the
    question without it. With dose.alpha 0 this is distillation from prompting."""
    vector: VectorConfig = field(default_factory=VectorConfig)
    """The steering vector."""
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    """Sampling."""
    filter: FilterConfig = field(default_factory=FilterConfig)
    """The coherence filter."""
    dose: DoseConfig = field(default_factory=DoseConfig)
    """The search for the dose."""
    heal: HealConfig = field(default_factory=HealConfig)
    """Training."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Measurement."""

    def __post_init__(self) -> None:
        _between("rounds", self.rounds, 1)
        _between("seed", self.seed, 0, 2**31 - 1)
