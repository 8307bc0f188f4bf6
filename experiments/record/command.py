"""What all commands share: parsing, exit status, and the console."""

import contextlib
import io
import logging
import sys
from collections.abc import Callable
from typing import TypeVar

import tyro
from rich.console import Console

from experiments.record.signals import Stopped
from shl.utils.errors import ShlError

C = TypeVar("C")


def command(main: Callable[[C], None], config: type[C], description: str | None) -> None:
    """Parse the command line into `config` and call `main` with it.

    Bad input ends with one sentence and status 2, a signal with 128 and its number.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        main(_parsed(config, description))
    except ShlError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        sys.exit(128 + stopped.number)


def _parsed(config: type[C], description: str | None) -> C:
    """Parse the command line; the sentence of a setting is raised without the frame and the hints
    that tyro prints around it."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(config, description=description)
    except SystemExit as stop:
        cause: BaseException | None = stop
        while cause is not None:
            if isinstance(cause, ShlError):
                raise cause from None
            cause = cause.__context__
        print(printed.getvalue(), end="", file=sys.stderr)
        raise


def wide_console() -> Console:
    """A console whose tables are not squeezed into a narrow terminal."""
    return Console(width=max(120, Console().width), soft_wrap=True)


def say(console: Console, text: str) -> None:
    """Print text as it is; names in it may hold square brackets."""
    console.print(text, markup=False, highlight=False)
