"""A record is what a run can have left: every line of its kind, in an order that can be."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from shl.config import FOUNDATIONS, LoopConfig
from shl.measure.tinymfv import TinymfvConfig
from shl.utils.errors import ShlError, require

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
    """Whether an instrument can be trusted on this model (see `shl.measure.validity`)."""

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
    """What is measured of a training step (see `shl.method.heal.HealStep`), or its mean."""

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


_EVENT: TypeAdapter[Any] = TypeAdapter(
    Annotated[
        StartEvent
        | StageEvent
        | ReadingEvent
        | ValidityEvent
        | VectorEvent
        | WalkEvent
        | HealingEvent
        | RoundEvent
        | TokenKlEvent
        | StarvedEvent
        | EndEvent,
        Field(discriminator="event"),
    ]
)
_TEXT: TypeAdapter[Any] = TypeAdapter(Text)
_SETTINGS: TypeAdapter[Any] = TypeAdapter(Settings)


def _refused(what: str, error: ValidationError) -> ShlError:
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    reason = " ".join(str(first["msg"]).split()).rstrip(".")
    return ShlError(f"{what} is malformed: {place}: {reason}.")


def settings_in(told: dict[str, Any], where: str) -> dict[str, Any]:
    """What config.json holds, checked; a setting that it lacks has its default.

    Raises:
        ShlError: the first setting that is unknown or out of range.
    """
    try:
        return _SETTINGS.validate_json(json.dumps(told)).model_dump(mode="json")
    except ValidationError as error:
        raise _refused(where, error) from error


def check_lines(events: list[dict[str, Any]], texts: list[dict[str, Any]], where: str) -> None:
    """Raise unless every line of a record has the shape that its kind must have.

    Raises:
        ShlError: the first line that has not, and what is wrong with it.
    """
    for name, lines, shape in (("event", events, _EVENT), ("text", texts, _TEXT)):
        for number, line in enumerate(lines, 1):
            try:
                shape.validate_python(line)
            except ValidationError as error:
                raise _refused(f"{name} {number} of {where}", error) from error
    for line in events:
        for key in ("nats", "shift", "shift_interval", "centred_shift"):
            require(
                line["event"] not in ("stage", "reading")
                or key not in line
                or set(line[key]) == set(FOUNDATIONS),
                f"{key} of a stage of {where} is not of the foundations {FOUNDATIONS}.",
            )
    _check_order(events, len(texts), where)


def name_of(event: dict[str, Any]) -> str:
    """What tells events of one round apart: the kind, or the stage's name, the instrument's too
    where it is not our own.

    Example:
        >>> name_of({"event": "stage", "stage": "healed"}), name_of({"event": "probe"})
        ('healed', 'probe')
        >>> name_of({"event": "validity", "instrument": "vignettes"})
        'validity:vignettes'
    """
    kind = str(event["event"])
    if kind == "reading":
        return f"{event['instrument']}:{event['stage']}"
    if kind == "validity":
        return f"validity:{event['instrument']}"
    return str(event["stage"]) if kind == "stage" else kind


AFTER: dict[str | None, tuple[str, ...]] = {
    None: ("start",),
    "start": ("base",),
    "base": ("prompted+",),
    "prompted+": ("prompted-",),
    "prompted-": ("validity", "vector"),
    "validity": ("validity", "vector"),
    "vector": ("probe", "batch", "steered", "starved"),
    "probe": ("batch", "steered", "starved"),
    "batch": ("batch", "steered", "starved"),
    "steered": ("healing",),
    "healing": ("healed",),
    "healed": ("round",),
    "round": ("token_kl", "vector", "end"),
    "token_kl": ("vector", "end"),
    "starved": (),
    "end": (),
}
"""What may follow what; a run that was cut off stops anywhere in between. Readings of a stage may
follow it, and change nothing of what comes after."""


def _check_order(events: list[dict[str, Any]], texts: int, where: str) -> None:
    last, index, count = None, -1, 0
    seen: set[str] = set()
    for number, event in enumerate(events, 1):
        name = kind = name_of(event)
        reads = event["event"] == "reading"
        if event["event"] == "validity":
            kind = "validity"
        index += kind == "vector"
        seen = seen if reads or kind == "validity" else set()
        fits = event["stage"] == last if reads else kind in AFTER[last]
        require(
            fits and event["round"] == index and name not in seen,
            f"event {number} of {where} is {name} of round {event['round']}, which cannot follow "
            f"{last}.",
        )
        seen.add(name)
        require(
            count <= event["texts"] <= texts,
            f"event {number} of {where} counts {event['texts']} texts, {count} to {texts} can be.",
        )
        last, count = (last if reads else kind), event["texts"]
