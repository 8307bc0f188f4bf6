"""Heal: train a fresh adapter on kept completions under a KL barrier.

    loss = mean over completions of [ mean_t NLL_t + lam * relu(D - tau) ],
    D = aggregate over t of KL(student || reference) at position t

lam follows its schedule as a floor and is raised by dual ascent while D stays above tau (Boyd et
al. 2011, "Distributed optimization and statistical learning via the alternating direction method
of multipliers", section 2.1), for the constraint D <= tau. Steps are taken in log lam, so that lam
stays positive.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from shl.config import HealConfig
from shl.hooks.adapter import Adapter, fresh_adapter
from shl.method.barrier import Barrier, Teacher, clip_gradient
from shl.models.generate import Completion
from shl.models.nan_checks import named
from shl.models.tokens import length_batches
from shl.utils.errors import ShlError, require
from shl.utils.files import read_safetensors, write_safetensors
from shl.utils.seeds import generator_for

Outcome = Literal["off", "never fired", "fired but did not bind", "bound"]


@dataclass(frozen=True)
class HealStep:
    """One optimiser step, measured before its update; means over the batch's completions.

    The fields from `nll` to `grad_barrier`, `lam` apart, are those of
    `shl.method.barrier.LossTerms`.
    """

    epoch: int
    step: int
    nll: float
    d: float
    lam: float
    fired: float
    tokens_over: float
    grad_nll: float
    grad_barrier: float
    grad_adapter: float  # 2-norm over A and B, before clipping


@dataclass(frozen=True)
class Healed:
    """A trained, frozen adapter and how the training went."""

    adapter: Adapter
    steps: tuple[HealStep, ...]
    config: HealConfig

    def epoch_mean(self, name: str, epoch: int = -1) -> float:
        """Mean of a `HealStep` field over an epoch (negative counts from the last)."""
        epoch = epoch % self.config.epochs
        values = [getattr(step, name) for step in self.steps if step.epoch == epoch]
        return sum(values) / len(values)

    @property
    def barrier(self) -> Outcome:
        """What the barrier did: bound means that D over the last epoch is within a tenth of tau
        or below it, after having fired."""
        if self.config.divergence == "none":
            return "off"
        if all(step.fired == 0 for step in self.steps):
            return "never fired"
        bound = self.epoch_mean("d") <= 1.1 * self.config.tau
        return "bound" if bound else "fired but did not bind"

    @property
    def moved(self) -> bool:
        """Whether any site's update is other than zero."""
        return any(norm > 0 for norm in self.adapter.norms().values())


def heal(
    model: HookedTransformer,
    kept: Sequence[Completion],
    config: HealConfig | None = None,
    *,
    seed: int = 0,
    teacher: Teacher | None = None,
) -> Adapter:
    """Train one adapter on kept completions, on top of whatever is on the model.

    Args:
        kept: their prompt tokens are context only, their own tokens are learnt.

    Returns:
        A frozen adapter, for `baked(model, [adapter])`.

    Raises:
        ShlError: nothing to train on, or a loss that is not finite.

    Example:
        >>> from shl.models.generate import generate
        >>> from shl.models.tiny import tiny_gemma
        >>> model = tiny_gemma()
        >>> kept = generate(model, ["Hello?"], max_new_tokens=8)
        >>> adapter = heal(model, kept, HealConfig(rank=2, epochs=1))
        >>> adapter.scale
        8.0
    """
    return train_adapter(model, kept, config, seed=seed, teacher=teacher).adapter


def train_adapter(
    model: HookedTransformer,
    kept: Sequence[Completion],
    config: HealConfig | None = None,
    *,
    index: int = 0,
    rounds: int = 1,
    seed: int = 0,
    axis: str | None = None,
    teacher: Teacher | None = None,
    on_step: "OnStep | None" = None,
    resume: "Training | None" = None,
) -> Healed:
    """`heal`, with the log of its steps; `index` of `rounds` places it in the lam schedule, and
    `axis` is for the adapter's file.

    Args:
        on_step: called after each optimiser step.
        resume: a state that `on_step` was given in an earlier process, by the same call; training
            goes on from there and ends with the same bits.
    """
    config = config or HealConfig()
    require(
        (teacher is not None) == (config.target == "soft"),
        f"target is {config.target!r} and teacher is {'' if teacher else 'not '}given; a teacher "
        "belongs to 'soft' alone.",
    )
    texts = [c for c in kept if c.tokens]
    if config.positions == "all":
        texts = [whole(c) for c in texts]
    require(len(texts) > 0, f"there is nothing to train on: {len(kept)} completions, all empty.")
    adapter = fresh_adapter(model, config, seed=seed, round=index, axis=axis)
    optimiser = torch.optim.AdamW(
        adapter.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay
    )
    places = length_batches(
        [len(c.prompt_tokens) + len(c.tokens) for c in texts], config.batch_size
    )
    batches = [[texts[i] for i in place] for place in places]
    total = config.epochs * len(batches)
    lam = floor = config.lam_at(index, rounds)
    log: list[HealStep] = []
    if resume is not None:
        lam, log = restore(resume, adapter, optimiser, texts)
    with adapter.attach(model) as handle:
        fired = log[-1].fired if log else 1.0
        barrier = Barrier(model, adapter, handle, batches, config, fired=fired, teacher=teacher)
        for step in range(len(log), total):
            epoch, place = divmod(step, len(batches))
            order = torch.randperm(len(batches), generator=generator_for(seed, "order", epoch))
            _set_lr(optimiser, config.lr, step, total)
            with named(f"epoch {epoch}, step {step}"):
                terms = barrier.backward(int(order[place]), lam)
                norm = clip_gradient(adapter, config.max_grad_norm)
            optimiser.step()
            weight = lam if config.divergence != "none" else 0.0
            log.append(HealStep(epoch, step, lam=weight, grad_adapter=norm, **vars(terms)))
            if config.calibrate and config.divergence != "none":
                lam = _next_lam(lam, terms.d, config, floor)
            if on_step is not None:
                on_step(log[-1], total, partial(snapshot, adapter, optimiser, lam, log, texts))
    return Healed(adapter.frozen(), tuple(log), config)


def whole(completion: Completion) -> Completion:
    """A completion whose prompt is learnt too, and what follows its last token; the soft target of
    a position does not depend on the token after it."""
    first, *prompt = completion.prompt_tokens
    tokens = (*prompt, *completion.tokens, completion.tokens[-1])
    return replace(completion, prompt_tokens=(first,), tokens=tokens)


def _set_lr(optimiser: torch.optim.Optimizer, lr: float, step: int, total: int) -> None:
    """Linear warm-up over the first tenth, then linear decay to a tenth of the peak."""
    warm = max(1, total // 10)
    rise = min(1.0, (step + 1) / warm)
    fall = 1.0 - 0.9 * max(0, step - warm) / max(1, total - warm)
    for group in optimiser.param_groups:
        group["lr"] = lr * rise * fall


def _next_lam(lam: float, d: float, config: HealConfig, floor: float) -> float:
    error = (d - config.tau) / max(config.tau, 0.1)
    moved = lam * math.exp(config.calibrate_rate * max(-1.0, min(1.0, error)))
    return max(floor, min(config.lam_max, moved))


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
    require(
        state.texts == digest(texts),
        f"the training state was saved over other texts ({state.texts[:12]}, these are "
        f"{digest(texts)[:12]}).",
    )
    parameters = _parameters(adapter)
    wanted = {f"{name}{key}" for name in parameters for key in ("", *_MOMENTS)}
    require(
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


OnStep = Callable[[HealStep, int, Callable[[], Training]], None]
"""Called as `on_step(step, total, state)`; `state()` is what training needs to go on from here."""
