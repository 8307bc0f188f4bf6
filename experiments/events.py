"""What a run's record may hold: one model per kind of line."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from experiments.tinymfv import TinymfvConfig
from shl.config import LoopConfig

Count = Annotated[int, Field(ge=0)]
Number = Annotated[float, Field(allow_inf_nan=False)]
PerFoundation = Annotated[dict[str, Number], Field(min_length=7, max_length=7)]
Pair = Annotated[list[Number], Field(min_length=2, max_length=2)]


class Strict(BaseModel):
    """No other keys, no conversions."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Event(Strict):
    """One line of events.jsonl.

    `round` is -1 before the first; `seconds` is computing time since the start of the run; `texts`
    counts the lines of texts.jsonl that are there when the event is written.
    """

    event: str
    round: Annotated[int, Field(ge=-1, lt=10_000)]
    seconds: Number
    texts: Count


class StartEvent(Event):
    """SHA-256 of the files that say what is run, and the hash of the model's weights."""

    event: Literal["start"]
    files: dict[str, str]
    weights: str


class StageEvent(Event):
    """One model measured."""

    event: Literal["stage"]
    stage: Literal["base", "prompted+", "prompted-", "steered", "healed"]
    style: Literal["completion", "digits"]
    nats: PerFoundation
    coherence: Number
    coherence_interval: Pair
    mass: list[Number]
    accuracy: Number
    noise: list[str]
    survival: Number
    perplexity: Number | None
    samples: Count
    labels: list[str]
    log_probs: list[list[list[Number]]]
    shift: PerFoundation
    shift_interval: dict[str, Pair]
    centred_shift: PerFoundation
    kappa: Number | None = None
    dose: Number | None = None


class Table(Strict):
    """What an instrument says in sum; keys are the instrument's own."""

    numbers: dict[str, Number | None]
    per_foundation: dict[str, dict[str, Number | None]]


class ReadingEvent(Event):
    """A stage, read by an instrument that is not our own vignettes.

    `log_probs` is `[item, asked, option]` in nats, null where the instrument got no answer.
    """

    event: Literal["reading"]
    instrument: str
    stage: Literal["base", "prompted+", "prompted-", "steered", "healed"]
    package: str
    version: str
    template: Literal["own", "minimal"]
    asked: Annotated[list[str], Field(min_length=1)]
    labels: list[str]
    log_probs: list[list[list[Number | None]]]
    nats: PerFoundation
    shift: PerFoundation
    table: Table


class OneFoundation(Strict):
    """How far an instrument is valid on one foundation of the axis."""

    informedness: Number
    informedness_p: Number
    contrast: Number
    interval: Pair
    expected: Literal[-1, 1]
    valid: bool


class ValidityEvent(Event):
    """Whether an instrument can be trusted on this model (see `experiments.validity`)."""

    event: Literal["validity"]
    instrument: str
    valid: bool
    reason: str
    informedness: Number
    informedness_p: Number
    split_half: Number
    agreement: dict[str, list[Number]]
    agreement_interval: dict[str, list[Pair]]
    foundations: dict[str, OneFoundation]
    items: Count
    unscorable: Count


class VectorEvent(Event):
    """A round's vector, in rounds/N/vector.safetensors."""

    event: Literal["vector"]
    norms: dict[str, Number]
    contexts: Count


class Rung(Strict):
    """What was counted at one dose."""

    kappa: Number
    dose: Number
    kept: Count
    generated: Count


class WalkEvent(Event):
    """The dose ladder, or a full batch, judged; its texts are the new lines of texts.jsonl."""

    event: Literal["probe", "batch"]
    batch: Count | None = None
    kappa: Number
    dose: Number
    at_floor: bool
    ladder: Annotated[list[Rung], Field(min_length=1)]


class Means(Strict):
    """What is measured of a training step (see `shl.heal_step.HealStep`), or its mean."""

    nll: Number
    d: Number
    lam: Number
    fired: Number
    tokens_over: Number
    grad_nll: Number
    grad_barrier: Number
    grad_adapter: Number


class Step(Means):
    """One training step."""

    epoch: Count
    step: Count


class HealingEvent(Event):
    """A round's training, its adapter in rounds/N/adapter.safetensors."""

    event: Literal["healing"]
    barrier: Literal["off", "never fired", "fired but did not bind", "bound"]
    moved: bool
    tau: Number
    epochs: Annotated[list[Means], Field(min_length=1)]
    steps: Annotated[list[Step], Field(min_length=1)]
    norms: dict[str, Number]


class RoundEvent(Event):
    """A round in short, once all of it is done."""

    event: Literal["round"]
    kappa: Number
    dose: Number
    kept: Count
    generated: Count
    at_floor: bool
    cosine_to_first: Annotated[dict[str, Number], Field(min_length=1)]


class Curve(Strict):
    """Per-token KL to base of one completion, nats; a healed one is a free sample of the round's
    student, its dose 0."""

    verdict: Literal["kept", "dropped", "healed"]
    prompt: str | None = None
    reasons: list[str]
    dose: Number
    pieces: list[str]
    kl: Annotated[list[Number], Field(min_length=1)]

    @model_validator(mode="after")
    def _one_piece_per_number(self) -> Self:
        if len(self.pieces) != len(self.kl):
            raise ValueError(f"{len(self.pieces)} pieces for {len(self.kl)} numbers")
        return self


class TokenKlEvent(Event):
    """A kept, a dropped and a healed completion of a round, token by token."""

    event: Literal["token_kl"]
    curves: list[Curve]


class StarvedEvent(Event):
    """Too few completions survived; the run ends here."""

    event: Literal["starved"]
    sentence: str


class EndEvent(Event):
    """All rounds are done."""

    event: Literal["end"]


class Settings(Strict):
    """config.json: what the command line asked for."""

    axis: str
    model: str
    device: str
    loop: LoopConfig
    eval: Literal["vignettes", "tinymfv"] = "vignettes"
    tinymfv: TinymfvConfig = Field(default_factory=TinymfvConfig)


class Text(Strict):
    """One line of texts.jsonl: a completion, judged."""

    round: Annotated[int, Field(ge=-1, lt=10_000)]
    stage: Literal["base", "prompted+", "prompted-", "probe", "batch", "healed"]
    prompt: str
    persona: str | None
    dose: Number
    text: str
    ended: bool
    tokens: list[Count]
    reasons: list[str]
    perplexity: Number | None
    tail_perplexity: Number | None
