"""The schema of a record: the shape of every line, and the order in which events may follow."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter

from shl.config import FOUNDATIONS, LoopConfig
from shl.measure.tinymfv import TinymfvConfig
from shl.utils.errors import ShlError, require

Count = Annotated[int, Field(ge=0)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Pair = Annotated[list[Number], Field(min_length=2, max_length=2)]
Round = Annotated[int, Field(ge=-1, lt=10_000)]
StageName = Literal["base", "prompted+", "prompted-", "steered", "healed"]


def _every_foundation(values: dict[str, Any]) -> dict[str, Any]:
    if set(values) != set(FOUNDATIONS):
        raise ValueError(f"the keys are {sorted(values)}, they must be {FOUNDATIONS}")
    return values


PerFoundation = Annotated[dict[str, Number], AfterValidator(_every_foundation)]


class Strict(BaseModel):
    """A model without other keys and without conversions."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Event(Strict):
    """One line of events.jsonl.

    `round` is -1 before the first; `seconds` is computing time since the start of the run; `cpu` is
    the CPU time of the process since the event before (None in older records), also where another
    run has computed the stage; `texts` is the number of lines of texts.jsonl when the event is
    written.
    """

    event: str
    round: Round
    seconds: Number
    cpu: Number | None = None
    texts: Count


class StartEvent(Event):
    """SHA-256 of the files in `reader.FILES`, and the hash of the model's weights."""

    event: Literal["start"]
    files: dict[str, str]
    weights: str


class StageEvent(Event):
    """A measured model."""

    event: Literal["stage"]
    stage: StageName
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
    shift_interval: Annotated[dict[str, Pair], AfterValidator(_every_foundation)]
    centred_shift: PerFoundation
    kappa: Number | None = None
    dose: Number | None = None


class Table(Strict):
    """The summary of an instrument, under its own keys."""

    numbers: dict[str, Number | None]
    per_foundation: dict[str, dict[str, Number | None]]


class ReadingEvent(Event):
    """A stage, read by an instrument other than the vignettes.

    `log_probs` is `[item, paraphrase, option]` in nats, null without an answer.
    """

    event: Literal["reading"]
    instrument: str
    stage: StageName
    package: str
    version: str
    template: Literal["own", "minimal"]
    asked: Annotated[list[str], Field(min_length=1)]
    labels: list[str]
    log_probs: list[list[list[Number | None]]]
    nats: PerFoundation
    shift: PerFoundation
    table: Table


class ItemsEvent(Event):
    """A stage, read by `shl.measure.continuations`.

    `items` holds the reading of each item; `value` and its interval are the statistic of that
    instrument beside base, paired by item.
    """

    event: Literal["items"]
    instrument: Literal["context", "cloze", "kl"]
    stage: StageName
    items: Annotated[list[Number], Field(min_length=2)]
    value: Number
    interval: Pair


class Shares(Strict):
    """A `shl.measure.retention.Retention`, with its share and cosine (null where undefined)."""

    teacher: Annotated[list[Number], Field(min_length=1)]
    both: Annotated[list[Number], Field(min_length=1)]
    student: Annotated[list[Number], Field(min_length=1)]
    share: Number | None
    cosine: Number | None


class RetentionEvent(Event):
    """What a round's student has of the teacher's shift, by source of the texts."""

    event: Literal["retention"]
    sources: dict[str, Shares]


class NullsEvent(Event):
    """Readings of random vectors, less base's: `values` is `[level, vector, sign]`, `levels` are
    the divergences at which they are matched, nats per token. The instrument is the cloze, or a
    foundation of the vignettes."""

    event: Literal["nulls"]
    instrument: Literal[
        "cloze", "care", "fairness", "loyalty", "authority", "sanctity", "liberty", "social"
    ]
    layers: list[Count]
    levels: Annotated[list[Number], Field(min_length=1)]
    values: Annotated[list[list[Pair]], Field(min_length=1)]

    @pydantic.model_validator(mode="after")
    def _one_count(self) -> Self:
        counts = {len(level) for level in self.values}
        if len(self.values) != len(self.levels) or len(counts) != 1 or 0 in counts:
            raise ValueError(
                f"{len(self.levels)} levels have {len(self.values)} tables of {sorted(counts)} "
                "vectors, every level needs one, all of the same number"
            )
        return self


class OneFoundation(Strict):
    """Validity of an instrument on one foundation of the axis."""

    informedness: Number
    informedness_p: Number
    contrast: Number
    interval: Pair
    expected: Literal[-1, 1]
    valid: bool


class ValidityEvent(Event):
    """Validity of an instrument on this model (see `shl.measure.validity`)."""

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
    """Counts at one dose."""

    kappa: Number
    dose: Number
    kept: Count
    generated: Count


class WalkEvent(Event):
    """The judged dose ladder or a judged batch; its texts are the new lines of texts.jsonl."""

    event: Literal["probe", "batch"]
    batch: Count | None = None
    rewinds: Count | None = None
    kappa: Number
    dose: Number
    at_floor: bool
    ladder: Annotated[list[Rung], Field(min_length=1)]


class Means(Strict):
    """Measurements of a training step (see `shl.method.heal.HealStep`), or their means."""

    nll: Number
    d: Number
    lam: Number
    fired: Number
    tokens_over: Number
    grad_nll: Number
    grad_barrier: Number
    grad_adapter: Number
    reward: Number | None = None


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


class NuisanceCosine(Strict):
    """A cosine with the bounds of its nulls, null where there are none (`shl.analysis.cosines`)."""

    value: Number
    random: Number | None
    shuffled: Number | None


class RoundEvent(Event, Rung):
    """Summary of a finished round; `nuisance` has the cosines of its vector to base's nuisance
    directions by name and layer, null where a direction is 0."""

    event: Literal["round"]
    at_floor: bool
    cosine_to_first: Annotated[dict[str, Number], Field(min_length=1)]
    nuisance: dict[str, dict[str, NuisanceCosine | None]] | None = None


class Curve(Strict):
    """Per-token KL to base of one completion, nats; a healed one is a free sample of the round's
    student with dose 0."""

    verdict: Literal["kept", "dropped", "healed"]
    prompt: str | None = None
    reasons: list[str]
    dose: Number
    pieces: list[str]
    kl: Annotated[list[Number], Field(min_length=1)]

    @pydantic.model_validator(mode="after")
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
    """All rounds are finished."""

    event: Literal["end"]


class Settings(Strict):
    """config.json: the settings of the command line."""

    axis: str
    model: str
    device: str
    engine: Literal["auto", "hooked", "bridge"] = "auto"
    dtype: Literal["float32", "bfloat16"] | None = None
    device_map: str | None = None
    loop: LoopConfig
    eval: Literal["vignettes", "tinymfv"] = "vignettes"
    tinymfv: TinymfvConfig = Field(default_factory=TinymfvConfig)


class Text(Strict):
    """One line of texts.jsonl: a judged completion.

    One that was rewound has `doses` and `pieces`, the dose and the text of each token, and
    `rewinds`, the tokens kept and the new dose of each; in other lines they are absent.
    """

    round: Round
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
    topic: Number | None = None
    doses: list[Number] | None = None
    pieces: list[str] | None = None
    rewinds: Annotated[list[Pair], Field(min_length=1)] | None = None

    @pydantic.model_validator(mode="after")
    def _one_dose_per_token(self) -> Self:
        for values in (self.doses, self.pieces):
            if values is not None and len(values) != len(self.tokens):
                raise ValueError(f"{len(values)} doses or pieces for {len(self.tokens)} tokens")
        if self.rewinds is not None and self.doses is None:
            raise ValueError("rewinds without doses")
        return self


_ANY_EVENT: TypeAdapter[Any] = TypeAdapter(
    Annotated[reduce(or_, Event.__subclasses__()), Field(discriminator="event")]  # type: ignore[arg-type]
)


def _validated(validate: Callable[[Any], Any], value: Any, what: str) -> Any:
    try:
        return validate(value)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        reason = " ".join(str(first["msg"]).split()).rstrip(".")
        raise ShlError(f"{what} is malformed: {place}: {reason}.") from error


def settings_in(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Validate the contents of config.json; a missing setting gets its default."""
    settings = _validated(Settings.model_validate_json, json.dumps(config), where)
    return settings.model_dump(mode="json")


def check_lines(events: list[dict[str, Any]], texts: list[dict[str, Any]], where: str) -> None:
    """Validate every line of a record and the order of its events."""
    for number, event in enumerate(events, 1):
        _validated(_ANY_EVENT.validate_python, event, f"event {number} of {where}")
    for number, text in enumerate(texts, 1):
        _validated(Text.model_validate, text, f"text {number} of {where}")
    _check_order(events, len(texts), where)


def name_of(event: Mapping[str, Any]) -> str:
    """The name of an event within its round: EVENT, STAGE, INSTRUMENT:STAGE, validity:INSTRUMENT
    or nulls:INSTRUMENT.

    Example:
        >>> name_of({"event": "stage", "stage": "healed"}), name_of({"event": "probe"})
        ('healed', 'probe')
        >>> name_of({"event": "validity", "instrument": "vignettes"})
        'validity:vignettes'
    """
    kind = str(event["event"])
    if kind in ("reading", "items"):
        return f"{event['instrument']}:{event['stage']}"
    if kind in ("validity", "nulls"):
        return f"{kind}:{event['instrument']}"
    return str(event["stage"]) if kind == "stage" else kind


AFTER: dict[str | None, tuple[str, ...]] = {
    None: ("start",),
    "start": ("base",),
    "base": ("prompted+",),
    "prompted+": ("prompted-",),
    "prompted-": ("validity", "nulls", "vector"),
    "validity": ("validity", "nulls", "vector"),
    "nulls": ("nulls", "vector"),
    "vector": ("probe", "batch", "steered", "starved"),
    "probe": ("batch", "steered", "starved"),
    "batch": ("batch", "steered", "starved"),
    "steered": ("healing", "starved"),
    "healing": ("healed",),
    "healed": ("retention", "round"),
    "retention": ("round",),
    "round": ("token_kl", "vector", "end"),
    "token_kl": ("vector", "end"),
    "starved": (),
    "end": (),
}
"""Events that may follow an event. Readings of a stage may follow it in addition."""


def _check_order(events: Sequence[Mapping[str, Any]], texts: int, where: str) -> None:
    last, index, count = None, -1, 0
    names: set[str] = set()  # of the readings or validity checks since the last other event
    for number, event in enumerate(events, 1):
        name, kind = name_of(event), event["event"]
        index += kind == "vector"
        if kind in ("reading", "items"):
            allowed = event["stage"] == last
        else:
            several = kind in ("validity", "nulls")
            last, before = (kind if several else name), last
            allowed = last in AFTER[before]
            names = names if several else set()
        require(
            allowed and event["round"] == index and name not in names,
            f"event {number} of {where} is {name} of round {event['round']}, which cannot follow "
            f"{name_of(events[number - 2]) if number > 1 else None}.",
        )
        names.add(name)
        require(
            count <= event["texts"] <= texts,
            f"event {number} of {where} counts {event['texts']} texts, it must be {count} to "
            f"{texts}.",
        )
        count = event["texts"]
