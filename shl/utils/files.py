"""Safetensors files that say what they are, and notice if they have been changed."""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Mapping
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
"""Axes, contexts, vignettes and probe, as TOML."""
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
"""What numbers may be stored as, by safetensors's names."""
Kinds = Mapping[str, tuple[type, ...]]
"""The types that each key of a file's metadata may have; no key may be missing or unknown."""


def identity(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> str:
    """SHA-256 of content alone: names, dtypes, shapes, numbers and metadata; no path, no time.

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


def check_told(what: object, meta: Mapping[str, Any], kinds: Kinds) -> None:
    """Raise unless metadata has exactly the keys of `kinds`, with values of their types.

    Numbers must be finite, whole ones from 0 to 2**31 - 1, strings printable.

    Example:
        >>> check_told("it", {"layer": -1}, {"layer": (int,)})
        Traceback (most recent call last):
        shl.utils.errors.ShlError: it says layer = -1, that must be ... from 0 to 2147483647.
    """
    differ = sorted(set(meta) ^ set(kinds))
    require(
        not differ,
        f"the metadata of {what} differs from what there must be at {short(differ)}.",
    )
    for key, allowed in kinds.items():
        value = meta[key]
        names = " or ".join("none" if t is type(None) else t.__name__ for t in allowed)
        require(
            type(value) in allowed,  # a bool is no int here
            f"{what} says {key} = {short(value)}, that must be {names}.",
        )
        if isinstance(value, int):
            ok, rule = 0 <= value < 2**31, "from 0 to 2147483647"
        elif isinstance(value, float):
            ok, rule = math.isfinite(value), "finite"
        elif isinstance(value, str):
            ok, rule = value.isprintable(), "printable"
        else:
            continue
        require(ok, f"{what} says {key} = {short(value)}, that must be {names}, {rule}.")


def write_safetensors(
    path: str | Path, file_format: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    """Write tensors with metadata and their identity, beside the place and renamed.

    Raises:
        ShlError: what could not be read back (numbers that are not finite, other dtypes than
            floating ones), or a place that cannot be written.
    """
    kept = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    for key, value in kept.items():
        require(
            value.dtype in DTYPES.values(), f"{key} has dtype {value.dtype}, it must be a float."
        )
        require(bool(torch.isfinite(value).all()), f"{key} holds numbers that are not finite.")
    told = {"format": file_format, **meta}
    told["identity"] = identity(kept, told)
    write_whole(Path(path), save(kept, metadata={"shl": json.dumps(told)}))


def write_whole(path: Path, data: bytes) -> None:
    """Write beside the place and rename, so that a reader never sees half a file.

    Raises:
        ShlError: the disk is full, or the folder is read-only or gone; what was there stays.
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
    path: str | Path, file_format: str, kinds: Kinds
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata (of `kinds`, `format` and `identity` aside) and tensors of a file that this
    package wrote.

    Raises:
        ShlError: missing, damaged, of another format, changed since it was written, with other
            metadata, or with numbers that are not finite.
    """
    try:
        with safe_open(str(path), "pt") as file:
            meta = json.loads((file.metadata() or {}).get("shl", "{}"))
            names = list(file.keys())
            for key in names:
                seen = file.get_slice(key).get_dtype()
                require(seen in DTYPES, f"{key!r} in {path} has dtype {seen}, it must be a float.")
            tensors = {key: file.get_tensor(key) for key in names}
        said = meta.pop("identity", None) if isinstance(meta, dict) else None
        found = identity(tensors, meta) if isinstance(meta, dict) else ""
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        if isinstance(error, ShlError):
            raise
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        raise ShlError(f"{path} cannot be read ({reason}).") from error
    stated = meta.pop("format", None) if isinstance(meta, dict) else None
    require(
        stated == file_format,
        f"{path} has format {short(stated)}, it must be {file_format!r}.",
    )
    require(
        said == found,
        f"{path} has been changed: its content has the identity {found[:12]}, it says "
        f"{short(said)[:14]}.",
    )
    check_told(path, meta, kinds)
    for key, value in tensors.items():
        require(bool(torch.isfinite(value).all()), f"{key!r} in {path} holds numbers not finite.")
    return meta, tensors
