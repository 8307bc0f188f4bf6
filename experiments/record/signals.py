"""Ctrl-C and SIGTERM: stop at once, but never during a write."""

import signal
from collections.abc import Iterator
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
    """

    def __init__(self) -> None:
        self._delaying = False
        self._received: int | None = None

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        self._received = number
        if not self._delaying:
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
