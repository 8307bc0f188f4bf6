"""Steer, heal, love: distil a steering vector into an adapter that keeps the model coherent."""

from shl.activations import activations, difference
from shl.adapter import Adapter
from shl.axes import Axis, load_axis
from shl.bake import baked, stack
from shl.config import (
    DoseConfig,
    EvalConfig,
    FilterConfig,
    GenerateConfig,
    HealConfig,
    LoopConfig,
    VectorConfig,
)
from shl.directions import SteeringVector
from shl.errors import ShlError
from shl.export import export_hf, export_peft
from shl.filters import judge, keep_coherent
from shl.generate import Completion, generate
from shl.heal import heal
from shl.hf_view import as_hf
from shl.hooks import suspended
from shl.kl import aggregate, reverse_kl_and_nll
from shl.ledger import Ledger
from shl.lens import logit_lens
from shl.loop import Round, baselines, love
from shl.models import load_model
from shl.response import dose_response
from shl.tokens import Prompt
from shl.trust import check
from shl.vector import extract_vector
from shl.vignettes import evaluate

__all__ = [
    "Adapter",
    "Axis",
    "Completion",
    "DoseConfig",
    "EvalConfig",
    "FilterConfig",
    "GenerateConfig",
    "HealConfig",
    "Ledger",
    "LoopConfig",
    "Prompt",
    "Round",
    "ShlError",
    "SteeringVector",
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
