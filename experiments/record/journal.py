"""Files that survive a crash: append-only JSON lines, atomic whole files, and the folder's lock.

Each line of a journal ends in a checksum: the first 16 hex digits of SHA-256 over the previous
checksum and this line's text. A last line without its newline was interrupted while it was written
and is ignored; any other modification is refused.
"""

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock, Timeout

from shl.utils.errors import ShlError, require
from shl.utils.files import write_whole

Line = dict[str, Any]
_CHECKED = re.compile(r'(.*), "check": "([0-9a-f]{16})"\}', re.DOTALL)


def write_error(path: Path, error: OSError) -> ShlError:
    """The error for a full disk, or a read-only or missing folder."""
    return ShlError(f"{path} cannot be written ({error.strerror or error}).")


def read_bytes(path: Path, *, missing: bytes | None = None) -> bytes:
    """The content of a file, or `missing` if that is given and there is no such file."""
    try:
        return path.read_bytes()
    except OSError as error:
        if missing is not None and isinstance(error, FileNotFoundError):
            return missing
        raise ShlError(f"{path} cannot be read ({error.strerror}).") from error


def write(path: Path, text: str) -> None:
    """Write a text file as `write_whole` does."""
    write_whole(path, text.encode())


def finite(value: float | None) -> float | None:
    """None in place of infinity and NaN, which JSON cannot hold."""
    return value if value is not None and math.isfinite(value) else None


def _checksum(previous: str, body: str) -> str:
    return hashlib.sha256(f"{previous}{body}".encode()).hexdigest()[:16]


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def _parse(data: bytes, path: Path) -> list[tuple[Line, str, int]]:
    """Each complete line, its checksum, and the offset of its end."""
    parsed, previous, end = [], "", 0
    for number, raw in enumerate(data.split(b"\n")[:-1], 1):
        end += len(raw) + 1
        try:
            match = _CHECKED.fullmatch(raw.decode())
            line = json.loads(raw, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise ShlError(f"line {number} of {path} is damaged ({error}).") from error
        require(
            match is not None
            and match[2] == _checksum(previous, match[1])
            and isinstance(line, dict),
            f"checksum mismatch in line {number} of {path}: the file was modified.",
        )
        previous = line.pop("check")
        parsed.append((line, previous, end))
    return parsed


def read_lines(path: Path) -> list[Line]:
    """Read the lines of a journal, none if there is no such file; raises as `Journal`."""
    return [line for line, *_ in _parse(read_bytes(path, missing=b""), path)]


class Journal:
    """An append-only file of JSON lines; existing ones beyond the first `keep` are cut off.

    Raises:
        ShlError: the file cannot be read or written, or was modified.
    """

    def __init__(self, path: Path, keep: int | None = None) -> None:
        self.path = path
        data = read_bytes(path, missing=b"")
        parsed = _parse(data, path)
        require(
            keep is None or len(parsed) >= keep,
            f"{path} has {len(parsed)} lines, it must have at least {keep}.",
        )
        parsed = parsed[:keep]
        self.lines = [line for line, *_ in parsed]
        _, self._previous, self._size = parsed[-1] if parsed else ({}, "", 0)
        if self._size < len(data):
            try:
                os.truncate(path, self._size)
            except OSError as error:
                raise write_error(path, error) from error

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Append lines in one piece; they are on the disk when this returns.

        If they cannot be written, this raises `ShlError` and the file is unchanged.
        """
        if not lines:
            return
        text, previous, parsed = "", self._previous, []
        for line in lines:
            body = json.dumps(line, ensure_ascii=False, allow_nan=False)[:-1]
            previous = _checksum(previous, body)
            text += f'{body}, "check": "{previous}"}}\n'
            parsed.append(json.loads(body + "}"))
        data = text.encode()
        try:
            # Only the first line may create the file: a deleted journal must not start anew.
            flags = os.O_WRONLY | os.O_APPEND | (0 if self._size else os.O_CREAT)
            descriptor = os.open(self.path, flags, 0o644)
            try:
                rest = data
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
                os.fsync(descriptor)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, self._size)
                raise
            finally:
                os.close(descriptor)
        except OSError as error:
            raise write_error(self.path, error) from error
        self._previous, self._size = previous, self._size + len(data)
        self.lines += parsed


def lock(folder: Path) -> FileLock:
    """Acquire the lock of a run folder; the system releases it when the process ends.

    Raises:
        ShlError: another process holds it, or the folder cannot be written.
    """
    path = folder / ".lock"
    acquired = FileLock(path)
    try:
        path.touch()  # FileLock reports a missing folder as a held lock.
        acquired.acquire(blocking=False)
        path.write_text(f"{os.getpid()}\n")
    except Timeout as error:
        holder = path.read_text("ascii", "replace").strip()
        raise ShlError(
            f"the run folder {folder} is in use by process {holder or 'unknown'}, wait for it or "
            "name another folder with --out."
        ) from error
    except OSError as error:
        raise write_error(path, error) from error
    return acquired


def is_locked(folder: Path) -> bool | None:
    """Whether a process holds the lock of a run folder; None where its file may not be opened."""
    path = folder / ".lock"
    try:
        with FileLock(path).acquire(blocking=False) if path.exists() else contextlib.nullcontext():
            return False
    except Timeout:
        return True
    except PermissionError:
        return None
