"""What a run measured, as JSON: raw scores included, so that any statistic can be taken again."""

import dataclasses
import math
from typing import Any

from shl.config import FOUNDATIONS, EvalConfig
from shl.dose import Walk
from shl.evaluation import Evaluation
from shl.heal import Healed
from shl.stages import Stage


def finite(value: float) -> float | None:
    """None for infinity (an empty completion's perplexity), which JSON cannot hold."""
    return value if math.isfinite(value) else None


def stage_numbers(stage: Stage, config: EvalConfig) -> dict[str, Any]:
    """A stage as JSON: every raw score, so that any statistic can be taken again later."""
    e = stage.evaluation
    return {
        "stage": stage.name,
        "style": e.style,
        "nats": e.nats,
        "coherence": e.coherence,
        "coherence_interval": e.coherence_interval(config),
        "mass": e.mass.tolist(),
        "accuracy": e.accuracy,
        "noise": list(e.noise),
        "survival": stage.survival,
        "perplexity": finite(stage.perplexity),
        "samples": len(stage.samples),
        "labels": list(e.labels),
        "log_probs": e.log_probs.tolist(),
    }


def shift_numbers(reading: Evaluation, base: Evaluation, config: EvalConfig) -> dict[str, Any]:
    """A stage's shifts from base in nats, with intervals paired by vignette."""
    return {
        "shift": reading.shift(base),
        "shift_interval": {
            name: reading.shift_interval(base, name, config) for name in FOUNDATIONS
        },
        "centred_shift": reading.centred_shift(base),
    }


def walk_numbers(walk: Walk) -> dict[str, Any]:
    """The dose walk as JSON."""
    return {
        "kappa": walk.kappa,
        "dose": walk.kappa * walk.config.alpha,
        "at_floor": walk.at_floor,
        "ladder": [
            {"kappa": k, "dose": k * walk.config.alpha, "kept": kept, "generated": n}
            for k, (kept, n) in zip(walk.kappas, walk.counts, strict=True)
        ],
    }


def healing_numbers(healing: Healed) -> dict[str, Any]:
    """Training as JSON: means per epoch, every step, and what the barrier did."""
    names = [
        f.name for f in dataclasses.fields(healing.steps[0]) if f.name not in ("epoch", "step")
    ]
    return {
        "barrier": healing.barrier,
        "moved": healing.moved,
        "tau": healing.config.tau,
        "epochs": [
            {name: healing.epoch_mean(name, epoch) for name in names}
            for epoch in range(healing.config.epochs)
        ],
        "steps": [vars(step) for step in healing.steps],
        "norms": healing.adapter.norms(),
    }
