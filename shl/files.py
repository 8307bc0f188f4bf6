"""Reading the safetensors files that this package wrote."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shl.errors import ShlError, check


def read_safetensors(
    path: str | Path, file_format: str
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file that this package wrote.

    Raises:
        ShlError: missing, damaged, of another format, or with numbers that are not finite.
    """
    try:
        with safe_open(str(path), "pt") as file:
            meta = json.loads((file.metadata() or {}).get("shl", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise ShlError(f"{path} cannot be read ({error}).") from error
    seen = meta.get("format") if isinstance(meta, dict) else None
    check(seen == file_format, f"{path} has format {seen!r}, it must be {file_format!r}.")
    for key, value in tensors.items():
        check(bool(torch.isfinite(value).all()), f"{key} in {path} holds numbers not finite.")
    return meta, tensors
