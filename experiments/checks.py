"""A record is what a run can have left: every line of its kind, in an order that can be."""

import json
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from experiments.events import (
    EndEvent,
    HealingEvent,
    ReadingEvent,
    RoundEvent,
    Settings,
    StageEvent,
    StartEvent,
    StarvedEvent,
    Text,
    TokenKlEvent,
    ValidityEvent,
    VectorEvent,
    WalkEvent,
)
from shl.config import FOUNDATIONS
from shl.errors import ShlError, check

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
            check(
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
        check(
            fits and event["round"] == index and name not in seen,
            f"event {number} of {where} is {name} of round {event['round']}, which cannot follow "
            f"{last}.",
        )
        seen.add(name)
        check(
            count <= event["texts"] <= texts,
            f"event {number} of {where} counts {event['texts']} texts, {count} to {texts} can be.",
        )
        last, count = (last if reads else kind), event["texts"]
