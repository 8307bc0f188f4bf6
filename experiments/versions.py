"""What a later reader needs to repeat a run."""

import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformer-lens", "transformers", "numpy", "einops", "safetensors")
ROOT = Path(__file__).parent.parent


def versions(device: str, others: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Python, packages, code, commit, device and threads; `others` are more packages."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES} | dict(others or {}),
        "code": code_digest(),
        "commit": commit.stdout.strip() if commit.returncode == 0 else "unknown",
        "device": device,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


def code_digest() -> str:
    """SHA-256 of every source and data file of `shl` and of the program, in order of their names.

    Tells a dirty tree from the commit it came from.
    """
    digest = hashlib.sha256()
    for room in ("shl", "experiments"):
        for path in sorted((ROOT / room).rglob("*")):
            if path.suffix in (".py", ".toml"):
                digest.update(path.relative_to(ROOT).as_posix().encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
