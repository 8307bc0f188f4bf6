"""The settings of a run, the versions it is run with, and the folder that it is kept in."""

import dataclasses
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from experiments.record.reader import INFORMATIONAL
from shl.config import LoopConfig
from shl.measure.tinymfv import TinymfvConfig, package, version_of
from shl.method.axes import Axis
from shl.models.load import choose_device

PACKAGES = ("torch", "transformer-lens", "transformers", "numpy", "einops", "safetensors")
Engine = Literal["auto", "hooked", "bridge"]
Dtype = Literal["float32", "bfloat16"]
ROOT = Path(__file__).parent.parent.parent


def versions(device: str, others: Mapping[str, str]) -> dict[str, Any]:
    """Python, packages, code, commit, device and threads; `others` are more packages."""
    commit = "unknown"
    if git := shutil.which("git"):
        describe = [git, "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
        found = subprocess.run(describe, capture_output=True, text=True, check=False)
        commit = found.stdout.strip() if found.returncode == 0 else commit
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES} | dict(others),
        "code": code_digest(),
        "commit": commit,
        "device": device,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


def code_digest() -> str:
    """SHA-256 of every source and data file of `shl` and `experiments`, uncommitted changes too."""
    digest = hashlib.sha256()
    for top in ("shl", "experiments"):
        for path in sorted((ROOT / top).rglob("*")):
            if path.suffix in (".py", ".toml"):
                digest.update(path.relative_to(ROOT).as_posix().encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


@dataclass(frozen=True)
class RunConfig:
    """Steer, filter, heal, repeat, and measure every round."""

    axis: str = "care_auth"
    """Built-in axis (care_auth, love, valence, formality) or the path of a TOML file."""
    model: str = "gemma-3-270m"
    """Embedded model (gemma-3-270m, smollm2-135m-instruct), hub name, or local folder."""
    out: Path | None = None
    """Run folder, a new one or one to continue; default runs/AXIS-MODEL-seedSEED-DIGEST."""
    device: str | None = None
    """Device of the model, such as cpu or cuda; default CUDA if there is any, else the CPU."""
    engine: Engine = "auto"
    """TransformerLens's HookedTransformer or TransformerBridge; auto is the first if installed."""
    dtype: Dtype | None = None
    """Dtype of the weights; default float32 on a CPU, bfloat16 on CUDA."""
    device_map: str | None = None
    """Devices by module for the engine bridge, as in transformers, such as auto."""
    eval: Literal["vignettes", "tinymfv"] = "vignettes"
    """Instrument that reads each stage beside the vignettes; tinymfv is the public package, which
    the extra of that name installs."""
    tinymfv: TinymfvConfig = field(default_factory=TinymfvConfig)
    """Settings of tinymfv."""
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")] = field(default_factory=LoopConfig)
    """The settings of every stage."""


def engine_options(config: RunConfig) -> dict[str, Any]:
    """The options of `load_model` that a run chooses; those at their defaults are absent, as in the
    records of earlier versions."""
    options = {name: getattr(config, name) for name in ("engine", "dtype", "device_map")}
    defaults = {"engine": "auto", "dtype": None, "device_map": None}
    return {name: x for name, x in options.items() if x != defaults[name]}


def settings_of(config: RunConfig, axis: Axis) -> dict[str, dict[str, Any]]:
    """The contents of the files in `reader.FILES`."""
    settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    settings.pop("out")
    for name in {"engine", "dtype", "device_map"} - engine_options(config).keys():
        del settings[name]
    packages: dict[str, str] = {}
    if config.eval == "vignettes":
        del settings["eval"], settings["tinymfv"]
    else:
        module = package()
        packages = {module.__name__: version_of(module)}
    settings["device"] = choose_device(config.device)
    return {
        "config.json": settings,
        "axis.json": vars(axis)
        | {"expected": dict(axis.expected), "cloze": axis.cloze and vars(axis.cloze)},
        "versions.json": versions(settings["device"], packages),
    }


def folder_of(config: RunConfig, settings: Mapping[str, Mapping[str, Any]]) -> Path:
    """The folder of a run: `config.out`, or one in runs/ whose name is its digest."""
    return config.out or Path("runs") / name_for(settings, f"seed{config.loop.seed}")


def name_for(settings: Mapping[str, Mapping[str, Any]], kind: str) -> str:
    """AXIS-MODEL-KIND-DIGEST, where the digest covers everything that determines the result."""
    covered = {
        name: {key: value for key, value in values.items() if key not in INFORMATIONAL}
        for name, values in settings.items()
    }
    digest = hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()[:8]
    model = settings["config.json"]["model"].rstrip("/").split("/")[-1]
    # The name in an axis file may be anything, even a path.
    parts = (re.sub(r"[^\w.-]+", "_", x) for x in (settings["axis.json"]["name"], model))
    # A folder's name has at most 255 bytes.
    axis, model = (part.encode()[:90].decode(errors="ignore") for part in parts)
    return f"{axis}-{model}-{kind}-{digest}"
