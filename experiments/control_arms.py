"""The arms of `make control`: what each applied, and what came of it."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformer_lens import HookedTransformer

from shl.activations import Recorder
from shl.axes import Axis
from shl.evaluation import Evaluation
from shl.filters import Verdict, judge
from shl.generate import Completion, generate
from shl.steering import Steering
from shl.tokens import length_batches, pad_left
from shl.vector import SteeringVector
from shl.vignettes import evaluate


@dataclass(frozen=True)
class ControlConfig:
    """Generate at a few doses with plain, gated and decaying steering, and compare."""

    axis: str = "care_auth"
    """Built-in name, or path of a TOML file."""
    model: str = "gemma-3-270m"
    """Embedded model, hub name, or local folder."""
    doses: tuple[float, ...] = (0.5, 1.0)
    """Mean applied doses that are compared [multiples of the raw vector]."""
    samples: int = 32
    """Answers per arm [count]."""
    max_new_tokens: int = 64
    """Longest answer [tokens]."""
    half_life: float = 20.0
    """Of the decaying dose [tokens]."""
    contexts: int = 64
    """Contexts behind the vector [count]."""
    show: int = 2
    """Answers printed per arm [count]."""
    seed: int = 42
    """Of the draws."""


@dataclass(frozen=True)
class Arm:
    """One way to steer, measured."""

    name: str
    nominal: float
    factors: dict[int, list[np.ndarray]]  # by layer, per text: [tok], of the answer's own tokens
    verdicts: list[Verdict]
    reading: Evaluation
    along: list[np.ndarray]  # per text: [tok, layer], base's residual along v on the same text

    @property
    def applied(self) -> float:
        """Mean factor over layers and tokens."""
        return float(self.by_layer.mean())

    @property
    def by_layer(self) -> np.ndarray:
        """`[layer]`: mean factor over tokens."""
        return np.array([np.concatenate(texts).mean() for texts in self.factors.values()])

    @property
    def spread(self) -> np.ndarray:
        """`[layer]`: standard deviation of the factor over tokens."""
        return np.array([np.concatenate(texts).std() for texts in self.factors.values()])

    def between(self, start: int, end: int) -> float:
        """Mean factor of the answers' tokens from `start` to `end`."""
        cut = [x[start:end] for texts in self.factors.values() for x in texts]
        return float(np.concatenate(cut).mean())

    def trait(self, base: "Arm") -> np.ndarray:
        """`[kept text, half]`: mean over tokens and layers of the z-score against base's tokens."""
        own = np.concatenate(base.along)
        mean, std = own.mean(0), own.std(0)
        kept = [x for x, v in zip(self.along, self.verdicts, strict=True) if v.kept]
        scores = [((x - mean) / std).mean(1) for x in kept]
        return np.array([[half.mean() for half in np.array_split(x, 2)] for x in scores])


def at_dose(
    model: HookedTransformer, axis: Axis, config: ControlConfig, vector: SteeringVector, dose: float
) -> list[Arm]:
    """The four arms whose mean applied dose is about `dose`: after one step of correction."""

    def nominal(**options: Any) -> float:
        pilot = replace(config, samples=8)
        with vector.steering(model, dose, record=True, **options) as steering:
            factors = _factors(steering, _texts(model, axis, pilot))
        seen = np.mean([np.concatenate(texts).mean() for texts in factors.values()])
        return dose * dose / float(seen)

    gate = measure(model, axis, config, vector, "gate", nominal(gate="cosine"), gate="cosine")
    constants = dict(zip(vector.directions, gate.by_layer.tolist(), strict=True))
    scaled = {layer: constants[layer] * v for layer, v in vector.directions.items()}
    layers = measure(model, axis, config, replace(vector, directions=scaled), "layers", 1.0)
    factors = {
        layer: [constants[layer] * x for x in texts] for layer, texts in layers.factors.items()
    }
    half = config.half_life
    return [
        measure(model, axis, config, vector, "plain", dose),
        gate,
        replace(layers, nominal=gate.nominal, factors=factors),
        measure(model, axis, config, vector, "decay", nominal(half_life=half), half_life=half),
    ]


def measure(
    model: HookedTransformer,
    axis: Axis,
    config: ControlConfig,
    vector: SteeringVector,
    name: str,
    nominal: float,
    **options: Any,
) -> Arm:
    """Generate and read the probe under one steering, then judge and read the texts without."""
    with vector.steering(model, nominal, record=True, **options) as steering:
        texts = _texts(model, axis, config)
        factors = _factors(steering, texts)
    with vector.steering(model, nominal, **options):
        reading = evaluate(model)
    print(f"{name} at {nominal:.2f} is read", file=sys.stderr)
    return Arm(name, nominal, factors, judge(model, texts), reading, along(model, texts, vector))


def _texts(model: HookedTransformer, axis: Axis, config: ControlConfig) -> list[Completion]:
    prompts = [axis.prompts[i % len(axis.prompts)] for i in range(config.samples)]
    return generate(model, prompts, max_new_tokens=config.max_new_tokens, seed=config.seed)


def _factors(steering: Steering, texts: Sequence[Completion]) -> dict[int, list[np.ndarray]]:
    return {
        layer: [
            steering.applied(layer, i)[len(c.prompt_tokens) :].numpy() for i, c in enumerate(texts)
        ]
        for layer in steering.factors
    }


@torch.no_grad()
def along(
    model: HookedTransformer, texts: Sequence[Completion], vector: SteeringVector
) -> list[np.ndarray]:
    """Per text `[tok, layer]`: base's residual along v at each token of the answer, so that what
    is measured is the text and not the steering."""
    names = {layer: f"blocks.{layer}.hook_resid_post" for layer in vector.directions}
    norms = vector.norms()
    rows = [[*c.prompt_tokens, *c.tokens] for c in texts]
    out = [np.empty((0, len(names)))] * len(texts)
    for chosen in length_batches([len(r) for r in rows], 16):
        batch = pad_left(model, [rows[i] for i in chosen])
        with Recorder(model, names.values()) as recorder:
            model(batch.tokens, attention_mask=batch.mask, stop_at_layer=max(names) + 1)
        each = [
            recorder.seen[name][0].float()
            @ (vector.directions[layer].to(model.W_U.device))
            / norms[layer]
            for layer, name in names.items()
        ]
        for i, states in zip(chosen, torch.stack(each, -1).cpu().numpy(), strict=True):
            out[i] = states[states.shape[0] - len(texts[i].tokens) :]
    return out
