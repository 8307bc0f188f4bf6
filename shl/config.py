"""Frozen settings, one dataclass per stage, validated on construction.

The defaults are the recommended method. Each field's docstring is also its `--help` text.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Annotated, Literal, get_args

from shl.utils.errors import ShlError, require

LINEAR_SITES = ("q", "k", "v", "o", "gate", "up", "down")
SITE_KINDS = (*LINEAR_SITES, "resid")
FOUNDATIONS = ("care", "fairness", "loyalty", "authority", "sanctity", "liberty", "social")


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


FP32_MAX = 3.4028234663852886e38


@dataclass(frozen=True)
class Range:
    """Finite numbers from `low` to `high`; `above` excludes `low` itself."""

    low: float
    high: float = math.inf
    above: bool = False

    def check(self, name: str, value: float) -> None:
        """Raise a `ShlError` unless `value` is in the range and a finite number in fp32."""
        inside = self.low < value if self.above else self.low <= value
        if inside and value <= min(self.high, FP32_MAX):
            return
        allowed = f"{'above' if self.above else 'at least'} {_plain(self.low)}"
        if self.high < math.inf:
            allowed += f" and at most {_plain(self.high)}"
        elif value > FP32_MAX:
            allowed += f" and at most {FP32_MAX:g}, the largest number of fp32"
        raise ShlError(f"{name} is {value!r}, it must be {allowed}.")


def _plain(limit: float) -> str:
    return str(int(limit)) if limit == int(limit) and abs(limit) < 2**53 else f"{limit:g}"


# More of anything fills the memory before the first stage is finished.
Count = Annotated[int, Range(1, 10**6)]
CountOrZero = Annotated[int, Range(0, 10**6)]
Share = Annotated[float, Range(0, 1)]
NonNegative = Annotated[float, Range(0)]


@dataclass(frozen=True)
class Settings:
    """Base of the settings: each field annotated with a `Range` or a `Literal` is checked.

    Raises:
        ShlError: a value is out of range.

    Example:
        >>> GenerateConfig(top_p=2.0)
        Traceback (most recent call last):
        shl.utils.errors.ShlError: top_p is 2.0, it must be above 0 and at most 1.
    """

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            match get_args(setting.type):
                case (_, Range() as allowed):
                    allowed.check(setting.name, value)
                case (str(), *_) as options:
                    listed = ", ".join(map(repr, options))
                    error = f"{setting.name} is {value!r}, it must be one of {listed}."
                    require(value in options, error)


@dataclass(frozen=True)
class VectorConfig(Settings):
    """Extraction of the steering vector: mean difference at the assistant tag.

    Raises:
        ShlError: a value is out of range.

    Example:
        >>> VectorConfig(contexts=32).layers is None  # the middle third
        True
    """

    contexts: Count = 64
    """Everyday questions put to both personas, drawn from the axis file by the study's seed
    [count]."""
    layers: tuple[int, ...] | None = None
    """Layers to steer, or None for the middle third of the model [layer indices]."""
    batch_size: Count = 16
    """Prompts in one forward pass [count]."""
    against: Literal["opposite", "no_persona"] = "opposite"
    """What the positive persona is contrasted with: the opposite persona, or the question alone."""
    direction: Literal["contrast", "random"] = "contrast"
    """contrast = the axis; random = a control: one Gaussian direction per layer, the same in every
    round, scaled to the same mean KL per token as the axis's vector."""
    remove: tuple[str, ...] = ()
    """Built-in axes whose vectors are projected out in every round, such as valence."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.layers is None or len(self.layers) > 0, "layers is empty, name at least one.")


@dataclass(frozen=True)
class GenerateConfig(Settings):
    """Sampling of completions. There is no repetition penalty, because loops must stay visible.

    Raises:
        ShlError: a value is out of range.

    Example:
        >>> GenerateConfig(temperature=0).max_new_tokens
        32
    """

    max_new_tokens: Count = 32
    """Longest completion [tokens]."""
    min_new_tokens: int = 0
    """The turn cannot end before this many tokens [tokens]."""
    temperature: NonNegative = 1.0
    """Softmax temperature; 0 is greedy."""
    top_k: CountOrZero = 64
    """Sample from this many most likely tokens; 0 is the whole vocabulary [tokens]."""
    top_p: Annotated[float, Range(0, 1, above=True)] = 0.95
    """Sample from the most likely tokens with this total probability, after top_k [share]."""
    batch_size: Count = 64
    """Rows decoded together [count]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Range(0, self.max_new_tokens).check("min_new_tokens", self.min_new_tokens)


@dataclass(frozen=True)
class FilterConfig(Settings):
    """Thresholds of the coherence filter. Every rule that fires is recorded.

    Raises:
        ShlError: a value is out of range.

    Example:
        >>> FilterConfig(min_words=4).max_tail_perplexity
        30.0
    """

    min_words: CountOrZero = 8
    """Completions with fewer words are dropped [words]."""
    max_tail_perplexity: Annotated[float, Range(1)] = 30.0
    """A completion is incoherent if base's perplexity on its last quarter is above this
    [exp nats per token]."""
    min_perplexity: float = 1.6
    """A completion is too predictable if base's perplexity on it or on its last quarter is below
    this [exp nats per token]."""
    max_word_share: Share = 0.2
    """Largest share of words that the most frequent word 2-, 3- or 4-gram may cover [share]."""
    max_char_share: Share = 0.25
    """Largest share of characters that the most frequent 3- to 12-character n-gram may cover
    [share]."""
    max_run: Count = 3
    """Longest run of the same word [count]."""
    min_compression: Share = 0.42
    """Smallest ratio of zlib-compressed to raw bytes of a completion [ratio]."""
    min_real_words: Share = 0.8
    """Smallest share of words that look like real ones: alphabetic, with a vowel, at most 18
    characters, no capitals inside [share]."""
    min_distinct_words: Share = 0.35
    """Smallest ratio of distinct words to all words [share]."""
    min_topic: float | None = None
    """Smallest mean of log p(token | its question) - log p(token | other questions) under base;
    text below it fits any question; None for no such rule. 0.1 separates run-on talk in part, at
    two more forward passes per completion that passes the other rules [nats per token]."""
    batch_size: Count = 16
    """Completions scored under base in one forward pass [count]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Range(1, self.max_tail_perplexity).check("min_perplexity", self.min_perplexity)
        if self.min_topic is not None:
            Range(0).check("min_topic", self.min_topic)


@dataclass(frozen=True)
class DoseConfig(Settings):
    """The search over the dose multiplier kappa.

    Raises:
        ShlError: a value is out of range.

    Example:
        >>> DoseConfig(rungs=3).alpha
        2.25
    """

    alpha: float = 2.25
    """Highest dose: kappa * alpha times the vector is added [multiples of the raw vector]. Text
    should break there, so that a run shows whether the filter notices. With 0 and walk off the
    student is not steered."""
    walk: bool = True
    """Probe a ladder of doses in each round. If off, every round uses kappa = 1."""
    kappa_min: Annotated[float, Range(0, 1, above=True)] = 0.13
    """Lowest kappa on the ladder [multiplier]."""
    rungs: Count = 6
    """Doses on the ladder, evenly spaced in log kappa from 1 down to kappa_min [count]."""
    probe_size: Count = 8
    """Completions per rung; all rungs are generated as rows of the same batches [count]."""
    target_survival: Share = 0.75
    """Share of probes that must pass the filter [share]."""
    min_train: Count = 24
    """Kept completions that a round needs for training [count]."""
    batch_size: Count = 24
    """Completions per batch at the chosen dose [count]."""
    max_batches: Count = 6
    """Largest number of batches that a round generates [count]."""
    backtrack: bool = False
    """Rewind a completion that becomes incoherent and continue it at a weaker dose, in the batches
    at the chosen dose (`shl.Backtrack`, with the thresholds of `filter`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Range(-FP32_MAX, FP32_MAX).check("alpha", self.alpha)
        require(
            self.alpha != 0 or not self.walk,
            "alpha is 0, so all doses of the walk are equal; set walk to False or alpha to a "
            "non-zero number.",
        )


@dataclass(frozen=True)
class HealConfig(Settings):
    """One round of training: loss = NLL + lam * relu(D - tau), per completion.

    Raises:
        ShlError: a value is out of range.

    Example:
        >>> HealConfig(rank=4, sites=("o", "down")).tau
        0.5
    """

    rank: Count = 16
    """Rank r of each adapter [count]."""
    lora_alpha: NonNegative = 16.0
    """The adapter's update is scaled by lora_alpha / rank."""
    sites: tuple[str, ...] = LINEAR_SITES
    """Sites of the adapter: any of q, k, v, o, gate, up, down, resid."""
    layers: tuple[int, ...] | None = None
    """Layers of the adapter, or None for all but the first and last sixth."""
    epochs: Count = 2
    """Passes over the kept completions [count]."""
    lr: NonNegative = 4e-4
    """AdamW's learning rate, after a warm-up over the first tenth of the steps."""
    batch_size: Count = 4
    """Completions per optimiser step [count]."""
    rows: int | None = None
    """Completions per forward pass within a step, None for all of them. Fewer take less memory and
    give the same gradient up to rounding [count]."""
    max_grad_norm: Annotated[float, Range(0, above=True)] = 1.0
    """Gradients are clipped to this 2-norm."""
    target: Literal["sampled", "soft"] = "sampled"
    """sampled = NLL of the sampled tokens; soft = KL(teacher || student) on the same tokens, where
    the teacher is the student that enters the round as it wrote the completions: steered, or with
    the persona in its prompt."""
    positions: Literal["completion", "all"] = "completion"
    """Positions that are learnt: those of the completion, or also those of the prompt and of the
    turn's end; all needs the soft target."""
    every: Count = 1
    """Learn every n-th of these positions, from another first one in each text; the vocabulary's
    products take most of a step's time [positions]."""
    clip: float | None = None
    """With the soft target: where the teacher's KL to the reference is above this, its hidden
    state is moved towards the unsteered student's, by the factor sqrt(clip / KL); None for no
    limit [nats]."""
    odd: bool = False
    """With the soft target: learn half the difference of the teachers at plus and minus the dose,
    so that what both have in common is not learnt."""
    unsteered: CountOrZero = 0
    """With the soft target: answers of the student without steering that the loop adds to the kept
    completions, sampled from the whole distribution [count]."""
    narrative: CountOrZero = 0
    """With the soft target: running text that the student continues from neutral openings, which
    the loop adds as well, so that more than one register is learnt from [count]."""
    divergence: Literal["kl_rev", "kl_fwd", "none"] = "kl_rev"
    """kl_rev = KL(student || reference), kl_fwd = KL(reference || student), none = plain NLL."""
    aggregate: str = "rmse"
    """How a completion's per-token divergences become D: mean, rmse, max or pNN (p95)."""
    reference: Literal["base", "prev"] = "base"
    """base = the original model, prev = the student at the start of the round (a trust region)."""
    tau: NonNegative = 0.5
    """Threshold of the barrier: D up to tau has no penalty [nats]."""
    lam: NonNegative = 1.0
    """Weight of the barrier at the start of round 0 [1]."""
    lam_final: float | None = None
    """Weight at the last round, None for the same weight in all rounds [1]."""
    lam_schedule: Literal["linear", "power"] = "linear"
    """linear = from lam to lam_final; power = lam * (round + 1) ** lam_power."""
    lam_power: Annotated[float, Range(-10, 10)] = -0.5
    """Exponent of the power schedule."""
    calibrate: bool = True
    """Raise lam by dual ascent while D is above tau, and lower it to no less than the schedule's
    value while D is below."""
    calibrate_rate: NonNegative = 0.15
    """Step size of the dual ascent: the largest change of log lam per optimiser step."""
    lam_max: float = 64.0
    """Ceiling of the calibrated weight [1]."""
    weight_decay: NonNegative = 0.0
    """AdamW's decoupled weight decay on A and B [1/step, times lr]."""
    sv_penalty: NonNegative = 0.0
    """Weight of the mean squared largest singular value of each scaled B A."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.sites) > 0, "sites is empty, name at least one.")
        listed = ", ".join(map(repr, SITE_KINDS))
        for site in self.sites:
            require(site in SITE_KINDS, f"a site is {site!r}, it must be one of {listed}.")
        require(len(set(self.sites)) == len(self.sites), f"sites {self.sites} names one twice.")
        if self.rows is not None:
            Range(1, self.batch_size).check("rows", self.rows)
        for setting in fields(self):
            if setting.name in ("positions", "clip", "odd", "unsteered", "narrative"):
                value = getattr(self, setting.name)
                require(
                    self.target == "soft" or value == setting.default,
                    f"{setting.name} is {value!r}, which needs target 'soft'.",
                )
        if self.clip is not None:
            Range(0, above=True).check("clip", self.clip)
        if self.lam_final is not None:
            Range(0).check("lam_final", self.lam_final)
            require(
                self.lam_schedule == "linear",
                "lam_final is set but lam_schedule is 'power', whose last weight follows from "
                "lam_power.",
            )
        Range(max(self.lam, self.lam_final or 0.0)).check("lam_max", self.lam_max)
        require(
            self.lam > 0 or not self.calibrate or self.divergence == "none",
            "lam is 0, which calibration cannot raise; set lam above 0 or calibrate to False.",
        )
        require(
            self.aggregate in ("mean", "rmse", "max") or quantile_of(self.aggregate) is not None,
            f"aggregate is {self.aggregate!r}, it must be 'mean', 'rmse', 'max' or 'pNN' with NN "
            "between 0 and 100.",
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


METHOD = HealConfig(
    target="soft",
    positions="all",
    every=2,
    unsteered=12,
    narrative=12,
    batch_size=3,
    epochs=1,
    lr=1e-3,
    tau=1.0,
)
"""Training as the loop does it; a `HealConfig` of one's own begins from sampled targets, which need
no teacher."""


@dataclass(frozen=True)
class OnlineConfig(Settings):
    """On-policy training, in which every step samples new completions from the current student.

    Of `HealConfig` it uses the adapter, the learning rate, `every`, `clip`, `odd`, the barrier and
    the penalties; what a fixed set of texts needs (target, positions, epochs, batch_size, unsteered
    and narrative) belongs to rounds. Sampling is from the whole distribution.

    Raises:
        ShlError: a value is out of range.

    Example:
        >>> OnlineConfig(objective="reward").groups
        4
    """

    objective: Literal["teacher", "reward"] = "teacher"
    """teacher = KL(student || teacher) on the student's completions, where the teacher is the
    current student with the vector on; reward = policy gradient of a reward (trait, coherence and
    filter) on completions at several doses."""
    every: Count = 10
    """Optimiser steps in a round, after which the student is measured [count]."""
    share: Annotated[float, Range(0, 1, above=True)] = 0.3
    """Dose of the teacher as a share of the round's: every step steers a student that earlier steps
    have moved already [share]."""
    refresh: Count = 5
    """The vector is extracted anew from the current student after this many steps [count]."""
    prompts: int | None = None
    """Prompts per step, None for 8 with the teacher and 4 with the reward [count]."""
    rows: Annotated[int, Range(2, 10**6)] = 8
    """With the reward: completions per prompt, the first half of them at dose 0 and the others at
    equally spaced doses up to the round's [count]."""
    ratio_cap: Annotated[float, Range(0, above=True)] = 2.0
    """With the reward: largest importance ratio p(token | student) / p(token | steered student) of
    a token of a steered completion [ratio]."""
    perplexity: Annotated[float, Range(1)] = 15.0
    """With the reward: a completion's reward falls by 1 for each nat by which its log perplexity
    under base is above the log of this [exp nats per token]."""
    penalty: NonNegative = 1.0
    """With the reward: subtracted from the reward of a completion that the filter drops."""
    min_survival: Share = 0.1
    """The run is starved if fewer of the student's completions pass the filter; the batch after
    each `refresh` steps is judged, and all of a round count [share]."""
    max_d: Annotated[float, Range(1)] = 20.0
    """The run has diverged if the mean D over `refresh` steps is above this many tau."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompts is not None:
            Range(1, 10**6).check("prompts", self.prompts)

    @property
    def groups(self) -> int:
        """Prompts per step."""
        return self.prompts or (8 if self.objective == "teacher" else 4)


@dataclass(frozen=True)
class EvalConfig(Settings):
    """Measurement of a model on the vignettes and on free samples.

    Raises:
        ShlError: a value is out of range.

    Example:
        >>> EvalConfig(samples=4).confidence
        0.95
    """

    bootstrap: Annotated[int, Range(10, 100_000)] = 1000
    """Bootstrap resamples of the items per interval; an answer takes ten times as many. More do not
    narrow it, and of 100,000 an answer takes 700 MB [count]."""
    confidence: Annotated[float, Range(0.5, 0.999)] = 0.95
    """Coverage of the intervals [share]."""
    conflicts: Annotated[int, Range(4, 40)] = 40
    """Crossed conflicts on which the use of context is read at each stage; two make one item of its
    interval, so that the number is even [count]."""
    nulls: Annotated[int, Range(0, 1000)] = 20
    """Random vectors of the same KL, both signs, beside the vignettes and the cloze; read once per
    model and layers and kept in the cache folder, those of the built-in models at the defaults come
    with the package; 0 for none [count]."""
    samples: Count = 64
    """Unsteered answers to the axis's prompts, sampled at each stage; twice as many of base, with
    which all are compared [count]."""
    persona_samples: Count = 32
    """Answers of the positive persona, if `samples` is not fewer; the negative one, whose answers
    no question uses, gives 8 at most [count]."""
    vignettes: Annotated[int, Range(7, 84)] = 28
    """Vignettes that are read at each stage, as many of each foundation as possible [count]."""
    batch_size: Count = 28
    """Vignettes scored in one forward pass [count]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.conflicts % 2 == 0,
            f"conflicts is {self.conflicts}, it must be even, since two make one item.",
        )


@dataclass(frozen=True)
class LoopConfig(Settings):
    """Settings of the whole study: rounds, seed, and one config per stage.

    Raises:
        ShlError: a value is out of range.

    Example:
        >>> LoopConfig(rounds=2, heal=HealConfig(rank=4)).heal.rank
        4
    """

    mode: Literal["rounds", "online"] = "rounds"
    """rounds = train on a batch of steered completions that passed the filter; online = train on
    completions that the student samples at each step."""
    rounds: Annotated[int, Range(1, 10_000)] = 2
    """Rounds of steer, filter, heal, or of `online.every` steps [count]."""
    seed: Annotated[int, Range(0, 2**31 - 1)] = 42
    """Seed of all random numbers."""
    prompted: bool = False
    """Put the positive persona into the prompt when completions are generated, and train on the
    question without it. With dose.alpha 0 this is distillation from prompting; with the soft
    target the teacher has the persona in its prompt."""
    vector: VectorConfig = field(default_factory=VectorConfig)
    """The steering vector."""
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    """Sampling."""
    filter: FilterConfig = field(default_factory=FilterConfig)
    """The coherence filter."""
    dose: DoseConfig = field(default_factory=DoseConfig)
    """The search for the dose."""
    heal: HealConfig = METHOD
    """Training."""
    online: OnlineConfig = field(default_factory=OnlineConfig)
    """Training in mode online."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rewarded = self.mode == "online" and self.online.objective == "reward"
        require(
            not (rewarded and self.prompted),
            "prompted is True with the objective 'reward', which has no teacher; set it to False.",
        )

    eval: EvalConfig = field(default_factory=EvalConfig)
    """Measurement."""
