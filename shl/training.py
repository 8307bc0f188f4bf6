"""The state of a training that was cut off: enough to go on with the same bits."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shl.errors import ShlError, check
from shl.files import read_safetensors, write_safetensors
from shl.generate import Completion
from shl.heal_step import HealStep
from shl.lora import Adapter

FORMAT = "shl-training-1"


@dataclass(frozen=True, eq=False)
class Training:
    """Factors and AdamW's moments per parameter, the barrier's next weight, and all steps so far.

    `texts` is a digest of what is trained on.
    """

    tensors: dict[str, Tensor]
    lam: float
    steps: tuple[HealStep, ...]
    texts: str

    def save(self, path: str | Path) -> None:
        """Write safetensors; the steps are in its metadata."""
        steps = [list(vars(step).values()) for step in self.steps]
        meta = {"lam": self.lam, "steps": steps, "texts": self.texts}
        write_safetensors(path, FORMAT, self.tensors, meta)

    @classmethod
    def load(cls, path: str | Path) -> "Training":
        """Read what `save` wrote.

        Raises:
            ShlError: missing, damaged, changed, or not one of ours.
        """
        kinds = {"lam": (float,), "steps": (list,), "texts": (str,)}
        meta, tensors = read_safetensors(path, FORMAT, kinds)
        try:
            steps = tuple(
                HealStep(int(epoch), int(step), *map(float, rest))
                for epoch, step, *rest in meta["steps"]
            )
            lam, texts = float(meta["lam"]), str(meta["texts"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ShlError(f"{path} holds no training state ({error}).") from error
        return cls(tensors, lam, steps, texts)


def digest(texts: Sequence[Completion]) -> str:
    """SHA-256 of the ids that are trained on, prompts and completions."""
    ids = [(list(c.prompt_tokens), list(c.tokens)) for c in texts]
    return hashlib.sha256(repr(ids).encode()).hexdigest()


def snapshot(
    adapter: Adapter,
    optimiser: torch.optim.Optimizer,
    lam: float,
    steps: Sequence[HealStep],
    texts: Sequence[Completion],
) -> Training:
    """A copy of the state after the last of `steps`."""
    tensors = {}
    for name, parameter in _parameters(adapter).items():
        tensors[name] = parameter.detach().clone()
        for key, value in optimiser.state[parameter].items():
            tensors[f"{name}.{key}"] = value.detach().clone()
    return Training(tensors, lam, tuple(steps), digest(texts))


def restore(
    state: Training,
    adapter: Adapter,
    optimiser: torch.optim.Optimizer,
    texts: Sequence[Completion],
) -> tuple[float, list[HealStep]]:
    """Put a state back into a fresh adapter and its optimiser; lam and the steps so far.

    Raises:
        ShlError: a state of other texts or other sites.
    """
    check(
        state.texts == digest(texts),
        f"the training state was saved over other texts ({state.texts[:12]}, these are "
        f"{digest(texts)[:12]}).",
    )
    parameters = _parameters(adapter)
    wanted = {f"{name}{key}" for name in parameters for key in ("", *_MOMENTS)}
    check(
        set(state.tensors) == wanted
        and all(state.tensors[name].shape == p.shape for name, p in parameters.items()),
        f"the training state differs from the adapter at "
        f"{sorted(set(state.tensors) ^ wanted)[:3] or 'its shapes'}.",
    )
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(state.tensors[name])
        optimiser.state[parameter] = {
            key[1:]: state.tensors[f"{name}{key}"].clone().to(_home(key, parameter))
            for key in _MOMENTS
        }
    return state.lam, list(state.steps)


_MOMENTS = (".step", ".exp_avg", ".exp_avg_sq")
"""What AdamW keeps per parameter."""


def _home(key: str, parameter: Tensor) -> torch.device:
    """AdamW counts its steps on the CPU."""
    return torch.device("cpu") if key == ".step" else parameter.device


def _parameters(adapter: Adapter) -> dict[str, Tensor]:
    out = {}
    for site in adapter.sites:
        out[f"{site.name}.A"] = adapter.down[site.name]
        out[f"{site.name}.B"] = adapter.up[site.name]
    return out
