"""Ctrl-C and SIGTERM: stop at once, but never during a write."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """Raised by a signal; not an `Exception`, so that no error handler catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Stop:
    """A context in which the signals raise `Stopped`, inside `delayed()` at its end.

    A second signal has its default effect and ends the process at once.

    Args:
        at_once: if off, a signal raises only at the end of a `delayed()`.
    """

    def __init__(
        self, *, at_once: bool = True, signals: Sequence[signal.Signals] = SIGNALS
    ) -> None:
        self.signals, self._at_once = signals, at_once
        self._delaying = False
        self._received: int | None = None

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._handle) for number in self.signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        for each in self.signals:
            signal.signal(each, signal.SIG_DFL)
        self._received = number
        if self._at_once and not self._delaying:
            raise Stopped(number)

    @contextmanager
    def delayed(self) -> Iterator[None]:
        """Delay signals until the block ends."""
        self._delaying = True
        try:
            yield
        finally:
            self._delaying = False
        if self._received is not None:
            raise Stopped(self._received)
