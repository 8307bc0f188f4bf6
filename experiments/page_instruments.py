"""The report's instruments: whether each is valid on the model, and what it read."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.summary import Event


@dataclass(frozen=True)
class Instrument:
    """Whether an instrument can be trusted on this model, and what it read."""

    name: str
    valid: bool | None
    reason: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]

    @property
    def sentence(self) -> str:
        """Beside every number of the instrument."""
        if self.valid is None:
            return "not checked on this model"
        return f"{'valid' if self.valid else 'not valid'} on this model: {self.reason}"


def instruments(events: Sequence[Event]) -> dict[str, Instrument]:
    """By name, every instrument of which there is a `validity` or a `reading` event."""
    checks = {e["instrument"]: e for e in events if e["event"] == "validity"}
    readings: dict[str, list[Event]] = {name: [] for name in checks}
    for e in events:
        if e["event"] == "reading":
            readings.setdefault(e["instrument"], []).append(e)
    found = {}
    for name, read in readings.items():
        numbers = [dict(_numbers(e)) for e in read]
        columns = tuple(dict.fromkeys(key for line in numbers for key in line))
        rows = tuple(
            (_label(e), tuple(f"{line[c]:.3g}" if c in line else "" for c in columns))
            for e, line in zip(read, numbers, strict=True)
        )
        told = checks.get(name)
        valid, reason = (told["valid"], told["reason"]) if told else (None, "")
        found[name] = Instrument(name, valid, reason, columns, rows)
    return found


def _label(e: Event) -> str:
    stage = e.get("stage", "reading")
    return stage if e["round"] < 0 else f"{stage} {e['round']}"


def _numbers(e: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a reading but its place in the record, nested ones under dotted names."""
    for key, value in e.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}.")
        elif type(value) in (int, float) and (prefix or key not in ("round", "seconds", "texts")):
            yield f"{prefix}{key}", float(value)
