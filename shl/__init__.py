"""Steer, heal, love: distil a steering vector into an adapter that keeps the model coherent."""

import sys
from importlib import import_module
from types import ModuleType

from shl.analysis.check import check
from shl.analysis.dose_response import dose_response
from shl.analysis.ledger import Ledger
from shl.analysis.logit_lens import logit_lens
from shl.config import (
    DoseConfig,
    EvalConfig,
    FilterConfig,
    GenerateConfig,
    HealConfig,
    LoopConfig,
    OnlineConfig,
    VectorConfig,
)
from shl.hooks.adapter import Adapter
from shl.hooks.bake import baked, stack
from shl.hooks.handle import suspended
from shl.hooks.vector import SteeringVector
from shl.kl import aggregate, reverse_kl_and_nll
from shl.measure.vignettes import evaluate
from shl.method.axes import Axis, load_axis
from shl.method.backtrack import Backtrack
from shl.method.barrier import Teacher
from shl.method.extract import extract_vector
from shl.method.filters import judge, keep_coherent
from shl.method.heal import heal
from shl.method.loop import Round, baselines, love
from shl.models.activations import activations, difference
from shl.models.as_hf import as_hf
from shl.models.export import export_hf, export_peft
from shl.models.generate import Completion, generate
from shl.models.load import load_model
from shl.models.tokens import Prompt
from shl.utils.errors import ShlError

# Short names of three modules.
for _alias, _name in (("tiny", "shl.models.tiny"), ("lens", "shl.analysis.logit_lens")):
    globals()[_alias] = sys.modules[f"shl.{_alias}"] = import_module(_name)


def __getattr__(name: str) -> ModuleType:
    """`shl.pictures`, which needs matplotlib and is imported on first access."""
    if name == "pictures":
        return import_module("shl.analysis.plots")
    raise AttributeError(f"module 'shl' has no attribute {name!r}")


__all__ = [
    "Adapter",
    "Axis",
    "Backtrack",
    "Completion",
    "DoseConfig",
    "EvalConfig",
    "FilterConfig",
    "GenerateConfig",
    "HealConfig",
    "Ledger",
    "LoopConfig",
    "OnlineConfig",
    "Prompt",
    "Round",
    "ShlError",
    "SteeringVector",
    "Teacher",
    "VectorConfig",
    "activations",
    "aggregate",
    "as_hf",
    "baked",
    "baselines",
    "check",
    "difference",
    "dose_response",
    "evaluate",
    "export_hf",
    "export_peft",
    "extract_vector",
    "generate",
    "heal",
    "judge",
    "keep_coherent",
    "load_axis",
    "load_model",
    "logit_lens",
    "love",
    "reverse_kl_and_nll",
    "stack",
    "suspended",
]
