"""Files that survive: JSON lines that only grow, whole files by rename, one writer at a time.

Each line of a journal ends in a check: the first 16 hex digits of SHA-256 over the line before and
this line's text. A line without its end is one that was cut off while it was written, and counts
as never written; any other change is noticed.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from shl.utils.errors import ShlError, require
from shl.utils.files import write_whole

Line = dict[str, Any]
_SEALED = re.compile(r'(.*), "check": "([0-9a-f]{16})"\}', re.DOTALL)


def failed(path: Path, error: OSError) -> ShlError:
    """A full disk, a read-only or a vanished folder, in a sentence."""
    return ShlError(f"{path} cannot be written ({error.strerror or error}).")


def write(path: Path, text: str) -> None:
    """A whole text file; a reader never sees half of it.

    Raises:
        ShlError: the disk is full, or the folder is read-only or gone.
    """
    write_whole(path, text.encode())


def _seal(before: str, body: str) -> str:
    return hashlib.sha256(f"{before}{body}".encode()).hexdigest()[:16]


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")


def _parse(text: bytes, path: Path) -> list[tuple[Line, str, int]]:
    """Lines with their checks, and where each ends; a torn last one is left out."""
    found = []
    before, end = "", 0
    for number, raw in enumerate(text.split(b"\n")[:-1], 1):
        end += len(raw) + 1
        try:
            sealed = _SEALED.fullmatch(raw.decode())
            line = json.loads(raw, parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            raise ShlError(f"line {number} of {path} is damaged ({error}).") from error
        require(
            sealed is not None and sealed[2] == _seal(before, sealed[1]) and isinstance(line, dict),
            f"line {number} of {path} has been changed: its check does not fit.",
        )
        before = line.pop("check")
        found.append((line, before, end))
    return found


def read_lines(path: Path) -> list[Line]:
    """The lines of a journal, none if there is no such file.

    Raises:
        ShlError: it cannot be read, or a line has been changed.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ShlError(f"{path} cannot be read ({error.strerror}).") from error
    return [line for line, *_ in _parse(text, path)]


class Journal:
    """Appends JSON lines to a file, after what it holds already.

    Args:
        keep: lines to keep of what is there, None for all; what comes after them is cut off.

    Raises:
        ShlError: the file cannot be read or written, or a line in it has been changed.
    """

    def __init__(self, path: Path, keep: int | None = None) -> None:
        self.path = path
        try:
            text = path.read_bytes() if path.exists() else b""
            found = _parse(text, path)
            require(
                keep is None or len(found) >= keep,
                f"{path} has {len(found)} lines, {keep} were written.",
            )
            found = found[:keep]
            self.lines = [line for line, *_ in found]
            self._check = found[-1][1] if found else ""
            self._size = found[-1][2] if found else 0
            if self._size < len(text):
                os.truncate(path, self._size)
        except OSError as error:
            raise failed(path, error) from error

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write lines in one piece; they are on the disk when this returns.

        Raises:
            ShlError: the disk is full, or the folder is read-only or gone; what was there stays.
        """
        if not lines:
            return
        text, last, own = "", self._check, []
        for line in lines:
            body = json.dumps(line, ensure_ascii=False, allow_nan=False)[:-1]
            last = _seal(last, body)
            text += f'{body}, "check": "{last}"}}\n'
            own.append(json.loads(body + "}"))
        data = text.encode()
        try:
            # A file that was there must be there still; only the first line may make it.
            flags = os.O_WRONLY | os.O_APPEND | (0 if self._size else os.O_CREAT)
            descriptor = os.open(self.path, flags, 0o644)
            try:
                written = 0
                while written < len(data):
                    written += os.write(descriptor, data[written:])
                os.fsync(descriptor)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, self._size)
                raise
            finally:
                os.close(descriptor)
        except OSError as error:
            raise failed(self.path, error) from error
        self._check, self._size = last, self._size + len(data)
        self.lines += own


class Lock:
    """One process per run folder; the system lets go of it when the process ends, however it does.

    Raises:
        ShlError: another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise failed(self.path, error) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(self._descriptor, 20).decode("ascii", "replace").strip()
            os.close(self._descriptor)
            raise ShlError(
                f"the run folder {folder} is in use by process {holder or 'unknown'}, wait for it "
                "or name another folder with --out."
            ) from error
        except OSError as error:
            os.close(self._descriptor)
            raise failed(self.path, error) from error
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, f"{os.getpid()}\n".encode())

    def release(self) -> None:
        """Let go; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> "Lock":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def held(folder: Path) -> bool:
    """Whether a process is at work on a run folder now."""
    try:
        with (folder / ".lock").open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
