"""The table at the end of a run, from its events alone."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.record.journal import Line, read_lines
from experiments.record.schema import check_lines, name_of, settings_in
from shl.config import FOUNDATIONS
from shl.measure.evaluation import Evaluation
from shl.measure.evaluation import on_axis as axis_shift
from shl.method.axes import Axis, axis_from
from shl.utils.errors import ShlError, require

FILES = ("config.json", "axis.json", "versions.json")
"""What is run; none of it changes while a run goes on."""
TOLD = ("commit", "cores")
"""Of versions.json, what is told of the first process and may differ in the next: the commit names
texts as well as code, whose own digest is beside it."""


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ShlError(f"{path} cannot be read ({error.strerror}).") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ShlError: the file cannot be read or holds something else.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ShlError(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise ShlError(f"{path} is not JSON ({error}).") from error
    require(isinstance(found, dict), f"{path} holds {type(found).__name__}, it must be an object.")
    return found


def same(old: Mapping[str, Any], new: Mapping[str, Any], path: Path) -> None:
    """Raise at the first setting that is not as it was, what is only told (`TOLD`) apart."""
    was, now = _flat(old), _flat(new)
    for key in (key for key in (*was, *now) if key not in TOLD):
        require(
            was.get(key) == now.get(key),
            f"{path} has {key} {was.get(key)!r}, this run has {now.get(key)!r}; a run goes on only "
            "as it began, name another folder with --out.",
        )


def same_run(folder: Path, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise unless a folder's files say that the same is run."""
    for name in FILES:
        same(read_json(folder / name), json.loads(json.dumps(settings[name])), folder / name)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        key: leaf
        for name, inner in value.items()
        for key, leaf in _flat(inner, f"{prefix}.{name}" if prefix else name).items()
    }


def check_files(folder: Path, start: Line) -> None:
    """Raise unless the files that say what is run are those that the run began with."""
    for name in FILES:
        found = digest(folder / name)
        require(
            start["files"].get(name) == found,
            f"{folder / name} has been changed since the run began (its SHA-256 is {found[:12]}).",
        )


def read(folder: Path) -> tuple[dict[str, Any], list[Line], list[Line]]:
    """Config, events and texts of a run folder; a line that was cut off counts as never written.

    Raises:
        ShlError: it is none, or something in it has been changed or is malformed.
    """
    require(
        (folder / "config.json").is_file() and (folder / "events.jsonl").is_file(),
        f"{folder} is no run folder, it has no config.json and events.jsonl.",
    )
    events, texts = read_lines(folder / "events.jsonl"), read_lines(folder / "texts.jsonl")
    check_lines(events, texts, str(folder))
    require(bool(events), f"the run in {folder} had not begun.")
    check_files(folder, events[0])
    config = settings_in(read_json(folder / "config.json"), str(folder / "config.json"))
    return config, events, texts[: events[-1]["texts"]]


def finished(folder: Path) -> bool:
    """Whether a folder holds a run with all of its rounds."""
    lines = read_lines(folder / "events.jsonl")
    return bool(lines) and lines[-1].get("event") == "end"


def axis_of(folder: Path) -> Axis:
    """The axis that a run was made with."""
    return axis_from(read_json(folder / "axis.json"), str(folder / "axis.json"))


class Lines(ABC):
    """The lines of a record."""

    folder: Path
    base: Evaluation | None = None

    @property
    @abstractmethod
    def events(self) -> list[Line]:
        """Every finished stage so far."""

    @property
    @abstractmethod
    def texts(self) -> list[Line]:
        """Every judged completion so far."""

    def find(self, name: str, index: int, batch: int | None = None) -> Line | None:
        """The event of a name (of a stage: its own) in a round, if it has been written."""
        for event in self.events:
            if (name_of(event), event["round"], event.get("batch")) == (name, index, batch):
                return event
        return None

    def texts_of(self, event: Line) -> list[Line]:
        """The completions that came with an event."""
        before = self.events[self.events.index(event) - 1]["texts"]
        return self.texts[before : event["texts"]]

    def place(self, index: int, name: str) -> Path:
        """Where a round's tensors of that name are."""
        return self.folder / "rounds" / str(index) / f"{name}.safetensors"


class Past(Lines):
    """A record that nobody writes to any more.

    Raises:
        ShlError: the folder holds no run, or something in it has been changed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings, self._events, self._texts = read(folder)

    @property
    def events(self) -> list[Line]:
        """Every finished stage."""
        return self._events

    @property
    def texts(self) -> list[Line]:
        """Every judged completion."""
        return self._texts


Event = Mapping[str, Any]


def stages(events: Sequence[Event], name: str) -> list[Event]:
    """The stage events of one name, in order of the rounds."""
    return [e for e in events if e["event"] == "stage" and e["stage"] == name]


def of_round(events: Sequence[Event], name: str) -> list[Event]:
    """The last event of one name per round."""
    last = {e["round"]: e for e in events if e["event"] == name}
    return [last[k] for k in sorted(last)]


def on_axis(stage: Event, base: Event, axis: Axis) -> float:
    """Mean shift of the axis's foundations in the expected direction, nats."""
    shift = np.array([stage["nats"][f] - base["nats"][f] for f in FOUNDATIONS])
    return float(axis_shift(shift, axis.expected))
