"""Finding one's way in a record: what was measured when, its texts and its tensors."""

from abc import ABC, abstractmethod
from pathlib import Path

from experiments.checks import name_of
from experiments.folder import read
from experiments.journal import Line
from shl.evaluation import Evaluation


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
