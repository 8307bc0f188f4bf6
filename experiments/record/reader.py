"""Read a run folder and check that it is unmodified."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.record.journal import Line, read_bytes, read_lines
from experiments.record.schema import check_lines, name_of, settings_in
from shl.method.axes import Axis, axis_from
from shl.utils.errors import ShlError, require

FILES = ("config.json", "axis.json", "versions.json")
"""The files that determine the result; they do not change while a run continues."""
INFORMATIONAL = ("commit", "cores")
"""Keys of versions.json that may differ when a run continues; the code has its own digest."""

Event = Mapping[str, Any]


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(read_bytes(path)).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises `ShlError` if the file cannot be read or holds something else."""
    data = read_bytes(path)
    try:
        value = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ShlError(f"{path} is not JSON ({error}).") from error
    require(isinstance(value, dict), f"{path} holds {type(value).__name__}, it must be an object.")
    return value


def require_same_run(folder: Path, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise at the first setting of a folder's files that differs, `INFORMATIONAL` ones apart."""
    for name in FILES:
        old, new = _flat(read_json(folder / name)), _flat(json.loads(json.dumps(settings[name])))
        for key in (key for key in (*old, *new) if key not in INFORMATIONAL):
            require(
                old.get(key) == new.get(key),
                f"{folder / name} has {key} {old.get(key)!r}, this run has {new.get(key)!r}; a run "
                "continues only with the same settings, name another folder with --out.",
            )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        key: leaf
        for name, inner in value.items()
        for key, leaf in _flat(inner, f"{prefix}.{name}" if prefix else name).items()
    }


def require_unmodified(folder: Path, start: Line) -> None:
    """Raise unless the files in `FILES` are those that the run began with."""
    for name in FILES:
        found = digest(folder / name)
        require(
            start["files"].get(name) == found,
            f"checksum mismatch: {folder / name} was modified after the run began (its SHA-256 is "
            f"{found[:12]}).",
        )


def read(folder: Path) -> tuple[dict[str, Any], list[Line], list[Line]]:
    """Config, events and texts of a run folder; an incomplete last line is ignored.

    Raises:
        ShlError: it is not a run folder, or something in it is modified or malformed.
    """
    require(
        (folder / "config.json").is_file() and (folder / "events.jsonl").is_file(),
        f"{folder} is no run folder, it has no config.json and events.jsonl.",
    )
    events, texts = read_lines(folder / "events.jsonl"), read_lines(folder / "texts.jsonl")
    check_lines(events, texts, str(folder))
    require(bool(events), f"the run in {folder} had not begun.")
    require_unmodified(folder, events[0])
    config = settings_in(read_json(folder / "config.json"), str(folder / "config.json"))
    return config, events, texts[: events[-1]["texts"]]


def is_finished(folder: Path) -> bool:
    """Whether a folder holds a run with all of its rounds."""
    return any(line.get("event") == "end" for line in read_lines(folder / "events.jsonl")[-1:])


def axis_of(folder: Path) -> Axis:
    """The axis of a run."""
    return axis_from(read_json(folder / "axis.json"), str(folder / "axis.json"))


class RecordReader:
    """The record of a run to which no process writes; raises as `read`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings, self.events, self.texts = read(folder)

    def find(self, name: str, index: int, batch: int | None = None) -> Line | None:
        """The event of a name (see `name_of`) in a round, None if it is not in the record."""
        key = (name, index, batch)
        found = (e for e in self.events if (name_of(e), e["round"], e.get("batch")) == key)
        return next(found, None)

    def texts_of(self, event: Line) -> list[Line]:
        """The completions that were written with an event."""
        before = self.events[self.events.index(event) - 1]["texts"]
        return self.texts[before : event["texts"]]

    def path_of(self, index: int, name: str) -> Path:
        """The tensor file of a round: vector, adapter or training."""
        return self.folder / "rounds" / str(index) / f"{name}.safetensors"


def stages(events: Sequence[Event], name: str) -> list[Event]:
    """The stage events of one name, in order of the rounds."""
    return [e for e in events if e["event"] == "stage" and e["stage"] == name]


def samples(texts: Sequence[Event], stage: Event) -> list[Event]:
    """The judged texts of a stage; a steered one's are those generated at its dose."""
    name, index, dose = stage["stage"], stage["round"], stage.get("dose")
    if name != "steered":
        return [t for t in texts if (t["stage"], t["round"]) == (name, index)]
    made = [t for t in texts if t["stage"] in ("probe", "batch") and t["round"] == index]
    return [t for t in made if dose is not None and abs(t["dose"] - dose) < 1e-9]


def items_of(events: Sequence[Event], instrument: str, stage: Event) -> Event | None:
    """The reading of a stage by an instrument of `shl.measure.continuations`, if on record."""
    key = (f"{instrument}:{stage['stage']}", stage["round"])
    return next((e for e in events if (name_of(e), e["round"]) == key), None)


def of_round(events: Sequence[Event], name: str) -> list[Event]:
    """The last event of one name per round."""
    last = {e["round"]: e for e in events if e["event"] == name}
    return [last[k] for k in sorted(last)]
