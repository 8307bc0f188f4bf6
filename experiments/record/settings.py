"""What a run is asked for, what it is told apart by, and where it is kept."""

import dataclasses
import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from experiments.record.reader import TOLD
from shl.config import LoopConfig
from shl.measure.tinymfv import TinymfvConfig, package, version_of
from shl.method.axes import Axis

PACKAGES = ("torch", "transformer-lens", "transformers", "numpy", "einops", "safetensors")
ROOT = Path(__file__).parent.parent.parent


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


@dataclass(frozen=True)
class RunConfig:
    """Steer, filter, heal, repeat, and measure every round."""

    axis: str = "care_auth"
    """Built-in axis (care_auth, love) or the path of your own TOML file."""
    model: str = "gemma-3-270m"
    """Embedded model (gemma-3-270m, smollm2-135m-instruct), hub name, or local folder."""
    out: Path | None = None
    """Run folder: a new one, or the one that this run began in; default
    runs/AXIS-MODEL-seedSEED-DIGEST, the digest of settings, axis, code and packages."""
    device: str | None = None
    """Where the model lives; default CUDA if there is any, else the CPU."""
    eval: Literal["vignettes", "tinymfv"] = "vignettes"
    """What reads each stage beside our own vignettes: tinymfv is the public package, installed
    with the extra of that name."""
    tinymfv: TinymfvConfig = field(default_factory=TinymfvConfig)
    """How much of tinymfv is asked."""
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")] = field(default_factory=LoopConfig)
    """The settings of every stage."""


def settings_of(config: RunConfig, axis: Axis) -> dict[str, dict[str, Any]]:
    """What is run, by file of the record."""
    asked = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    asked.pop("out")
    others: dict[str, str] = {}
    if config.eval == "vignettes":
        del asked["eval"], asked["tinymfv"]
    else:
        module = package()
        others = {module.__name__: version_of(module)}
    asked["device"] = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    told = {key: getattr(axis, key) for key in ("name", "description", "positive", "negative")}
    lists = {"contexts": axis.contexts, "prompts": axis.prompts, "expected": dict(axis.expected)}
    return {
        "config.json": asked,
        "axis.json": told | lists,
        "versions.json": versions(asked["device"], others),
    }


def folder_of(config: RunConfig, settings: Mapping[str, Mapping[str, Any]]) -> Path:
    """Where the run is kept: the same for the same run, another for any other."""
    if config.out is not None:
        return config.out
    return Path("runs") / name_for(settings, f"seed{config.loop.seed}")


def name_for(settings: Mapping[str, Mapping[str, Any]], what: str) -> str:
    """AXIS-MODEL-WHAT-DIGEST, the digest that of everything that is run."""
    told = {
        name: {key: value for key, value in values.items() if key not in TOLD}
        for name, values in settings.items()
    }
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]
    model = settings["config.json"]["model"].rstrip("/").split("/")[-1]
    # An axis file may call itself anything, a path included.
    names = "-".join(re.sub(r"[^\w.-]+", "_", x) for x in (settings["axis.json"]["name"], model))
    return f"{names}-{what}-{digest}"
