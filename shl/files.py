"""Safetensors files that say what they are, and notice if they have been changed."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from shl.errors import ShlError, check


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


def write_safetensors(
    path: str | Path, file_format: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    """Write tensors with metadata and their identity, beside the place and renamed."""
    path = Path(path)
    kept = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    told = {"format": file_format, **meta}
    told["identity"] = identity(kept, told)
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        scratch.write_bytes(save(kept, metadata={"shl": json.dumps(told)}))
        scratch.replace(path)
    except OSError as error:
        raise ShlError(f"{path} cannot be written ({error.strerror}).") from error


def read_safetensors(
    path: str | Path, file_format: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of a file that this package wrote.

    Raises:
        ShlError: missing, damaged, of another format, changed since it was written, or with
            numbers that are not finite.
    """
    try:
        with safe_open(str(path), "pt") as file:
            meta = json.loads((file.metadata() or {}).get("shl", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        raise ShlError(f"{path} cannot be read ({reason}).") from error
    seen = meta.get("format") if isinstance(meta, dict) else None
    check(seen == file_format, f"{path} has format {seen!r}, it must be {file_format!r}.")
    said = meta.pop("identity", None)
    found = identity(tensors, meta)
    check(
        said == found,
        f"{path} has been changed: its content has the identity {found[:12]}, it says "
        f"{str(said)[:12]}.",
    )
    for key, value in tensors.items():
        check(bool(torch.isfinite(value).all()), f"{key} in {path} holds numbers not finite.")
    return meta, tensors
