"""Safetensors files with a metadata schema and a checksum of the content."""

import contextlib
import hashlib
import json
import math
import os
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from shl.utils.errors import ShlError, require

DATA = resources.files("shl") / "data"
"""Folder of the axes, contexts, vignettes and the probe (TOML), and of random vectors' readings."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes that may be stored."""
Schema = Mapping[str, tuple[type, ...]]
"""The allowed types of each key of a file's metadata; no key may be missing or unknown."""
NONE = type(None)
MADE_ON: Schema = {
    "model": (str,),
    "weights": (str, NONE),
    "dtype": (str, NONE),
    "round": (int, NONE),
}
"""The provenance of a vector or adapter: name, `weights_hash` and dtype of its base model, and the
round of the loop."""


@cache
def texts_in(file: str, key: str) -> tuple[str, ...]:
    """A list of texts in a TOML file of the data folder.

    Example:
        >>> len(texts_in("openings.toml", "openings"))
        48
    """
    return tuple(tomllib.loads((DATA / file).read_text("utf-8"))[key])


def identity(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> str:
    """SHA-256 of names, dtypes, shapes, numbers and metadata, independent of path and time.

    Example:
        >>> import torch
        >>> a, b = torch.zeros(2), torch.tensor([0.0, 1e-30])
        >>> identity({"x": a}, {}) == identity({"x": a.clone()}, {}) != identity({"x": b}, {})
        True
    """
    digest = hashlib.sha256(json.dumps(dict(meta), sort_keys=True).encode())
    for key in sorted(tensors):
        value = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def require_metadata(what: object, meta: Mapping[str, Any], schema: Schema) -> None:
    """Raise unless metadata has exactly the keys of `schema`, with values of the right types.

    Floats must be finite, integers between 0 and 2**31 - 1, strings printable.

    Example:
        >>> require_metadata("it", {"layer": -1}, {"layer": (int,)})
        Traceback (most recent call last):
        shl.utils.errors.ShlError: layer in it is -1, it must be ... from 0 to 2147483647.
    """
    differ = sorted(set(meta) ^ set(schema))
    require(not differ, f"the metadata of {what} has missing or unknown keys: {short(differ)}.")
    for key, allowed in schema.items():
        value = meta[key]
        names = " or ".join("none" if t is NONE else t.__name__ for t in allowed)
        require(
            type(value) in allowed,  # not isinstance: a bool is an int
            f"{key} in {what} is {short(value)}, it must be {names}.",
        )
        if isinstance(value, int):
            ok, rule = 0 <= value < 2**31, "from 0 to 2147483647"
        elif isinstance(value, float):
            ok, rule = math.isfinite(value), "finite"
        elif isinstance(value, str):
            ok, rule = value.isprintable(), "printable"
        else:
            continue
        require(ok, f"{key} in {what} is {short(value)}, it must be {names}, {rule}.")


def _require_floats(tensors: Mapping[str, Tensor], where: str = "") -> None:
    for key, value in tensors.items():
        require(
            value.dtype in DTYPES, f"{key!r}{where} has dtype {value.dtype}, it must be a float."
        )
        require(
            bool(torch.isfinite(value).all()), f"{key!r}{where} has numbers that are not finite."
        )


def write_safetensors(
    path: str | Path, file_format: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    """Write tensors, metadata and their checksum to one file.

    Raises:
        ShlError: a number is not finite, a dtype is not a float, or the path cannot be written.
    """
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    _require_floats(tensors)
    meta = {"format": file_format, **meta}
    meta["identity"] = identity(tensors, meta)
    write_whole(Path(path), save(tensors, metadata={"shl": json.dumps(meta)}))


def write_whole(path: Path, data: bytes) -> None:
    """Write a file atomically: to a temporary file in the same folder, then rename it.

    Raises:
        ShlError: the file cannot be written; an existing file is unchanged.
    """
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        with scratch.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        scratch.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise ShlError(f"{path} cannot be written ({error.strerror or error}).") from error


def read_safetensors(
    path: str | Path, file_format: str, schema: Schema
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata (as in `schema`, without `format` and `identity`) and tensors of a file written by
    `write_safetensors`.

    Raises:
        ShlError: the file is missing, damaged, modified or of another format, its metadata does not
            match `schema`, or a number is not finite.
    """
    try:
        with safe_open(str(path), "pt") as file:
            meta = json.loads((file.metadata() or {}).get("shl", "{}"))
            tensors = {key: file.get_tensor(key) for key in list(file.keys())}
        meta = meta if isinstance(meta, dict) else {}
        stored, computed = meta.pop("identity", None), identity(tensors, meta)
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        raise ShlError(f"{path} cannot be read ({reason}).") from error
    stated = meta.pop("format", None)
    require(
        stated == file_format, f"{path} has format {short(stated)}, it must be {file_format!r}."
    )
    require(
        stored == computed,
        f"checksum mismatch: {path} was modified (its content has the identity {computed[:12]}, "
        f"its metadata has {str(stored)[:12]}).",
    )
    require_metadata(path, meta, schema)
    _require_floats(tensors, f" in {path}")
    return meta, tensors
