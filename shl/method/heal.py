"""Training of a fresh adapter on kept completions under a KL barrier.

    loss = mean over completions of [ mean_t L_t + lam * relu(D - tau) ],
    L = NLL of the sampled token, or KL(teacher || student) with the soft target,
    D = aggregate over t of KL(student || reference) at position t

lam follows its schedule as a floor and is raised by dual ascent while D stays above tau (Boyd et
al. 2011, "Distributed optimization and statistical learning via the alternating direction method
of multipliers", section 2.1), for the constraint D <= tau. Steps are taken in log lam, so that lam
stays positive.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from shl.config import HealConfig
from shl.hooks.adapter import Adapter, fresh_adapter
from shl.method.barrier import Barrier, Teacher, clip_gradient
from shl.models.generate import Completion
from shl.models.nan_checks import named
from shl.models.tokens import encode, length_batches
from shl.utils.errors import ShlError, require
from shl.utils.files import read_safetensors, write_safetensors
from shl.utils.model import Model
from shl.utils.seeds import generator_for

Outcome = Literal["off", "never fired", "fired but did not bind", "bound"]


@dataclass(frozen=True)
class HealStep:
    """One optimiser step, measured before its update; means over the batch's completions."""

    epoch: int
    step: int
    nll: float  # nats per token
    d: float  # nats
    lam: float
    fired: float  # share of completions with D > tau
    tokens_over: float  # share of tokens with divergence > tau
    grad_nll: float  # 2-norm of the gradient at the final hidden states
    grad_barrier: float  # likewise, lam included
    grad_adapter: float  # 2-norm over A and B, before clipping
    reward: float | None = None  # mean over the completions, if there is one


@dataclass(frozen=True)
class Healed:
    """A trained, frozen adapter and the log of its training."""

    adapter: Adapter
    steps: tuple[HealStep, ...]
    config: HealConfig

    def epoch_mean(self, name: str, epoch: int = -1) -> float:
        """Mean of a `HealStep` field over an epoch (negative counts from the last); online, the
        steps with the same vector are an epoch."""
        epoch = epoch % self.epochs
        values = [getattr(step, name) for step in self.steps if step.epoch == epoch]
        return sum(values) / len(values)

    @property
    def epochs(self) -> int:
        """Number of epochs."""
        return self.steps[-1].epoch + 1

    @property
    def barrier(self) -> Outcome:
        """Effect of the barrier; "bound" means that it fired and that the last epoch's mean D is at
        most 1.1 tau."""
        if self.config.divergence == "none":
            return "off"
        if all(step.fired == 0 for step in self.steps):
            return "never fired"
        bound = self.epoch_mean("d") <= 1.1 * self.config.tau
        return "bound" if bound else "fired but did not bind"

    @property
    def moved(self) -> bool:
        """Whether any site's update is non-zero."""
        return any(norm > 0 for norm in self.adapter.norms().values())


def heal(
    model: Model,
    kept: Sequence[Completion],
    config: HealConfig | None = None,
    *,
    seed: int = 0,
    teacher: Teacher | None = None,
) -> Adapter:
    """Train one adapter on kept completions, with the hooks that are on the model.

    Args:
        kept: completions; with the sampled target their prompts are context without loss.
        teacher: the model whose distributions are learnt, for `HealConfig(target="soft")`.

    Returns:
        A frozen adapter, for `baked(model, [adapter])`.

    Raises:
        ShlError: all completions are empty, a loss is not finite, or the target and the teacher do
            not go together.

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
    model: Model,
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
    """Train as `heal` does, and return the log of all steps as well.

    Args:
        index: round out of `rounds`, for the schedule of lam.
        axis: name of the axis, for the adapter's file.
        on_step: called after each optimiser step.
        resume: a state that `on_step` received from the same call in an earlier process; training
            continues from there and ends with the same bits.
    """
    config = config or HealConfig()
    require(
        (teacher is not None) == (config.target == "soft"),
        f"target is {config.target!r} and teacher is {'' if teacher else 'not '}given; a teacher "
        "belongs to 'soft' alone.",
    )
    opposite = teacher is not None and teacher.opposite is not None
    require(
        config.odd == opposite,
        f"odd is {config.odd} and teacher.opposite is {'' if opposite else 'not '}given; they "
        "belong together.",
    )
    persona = teacher.persona if teacher else None
    pairs = [learnt(model, c, config.positions, persona) for c in kept if c.tokens]
    texts = [student for student, _ in pairs]
    require(len(texts) > 0, f"there is nothing to train on: {len(kept)} completions, all empty.")
    lengths = [len(c.prompt_tokens) + len(c.tokens) for c in texts]
    split = length_batches(lengths, config.batch_size)
    batches = [[texts[i] for i in rows] for rows in split]
    read = [[pairs[i][1] for i in rows] for rows in split]
    total = config.epochs * len(batches)
    trainer = Trainer(model, config, index=index, rounds=rounds, seed=seed, axis=axis)
    log = trainer.log
    if resume is not None:
        trainer.restore(resume, digest(texts))
    with trainer.adapter.attach(model) as handle:
        fired = log[-1].fired if log else 1.0
        barrier = Barrier(
            model,
            trainer.adapter,
            handle,
            batches,
            config,
            fired=fired,
            teacher=teacher,
            read=read,
        )
        for step in range(len(log), total):
            epoch, place = divmod(step, len(batches))
            order = torch.randperm(len(batches), generator=generator_for(seed, "order", epoch))
            with named(f"epoch {epoch}, step {step}"):
                trainer.step(barrier, int(order[place]), epoch, total)
            if on_step is not None:
                on_step(log[-1], total, partial(trainer.state, digest(texts)))
    return Healed(trainer.adapter.frozen(), tuple(log), config)


class Trainer:
    """A fresh adapter in training: its optimiser, the barrier's next weight, and the log.

    Args:
        index: round out of `rounds`, for the schedule of lam.
    """

    def __init__(
        self,
        model: Model,
        config: HealConfig,
        *,
        index: int,
        rounds: int,
        seed: int,
        axis: str | None,
    ) -> None:
        self.config = config
        self.adapter = fresh_adapter(model, config, seed=seed, round=index, axis=axis)
        self.optimiser = torch.optim.AdamW(
            self.adapter.parameters(),
            lr=config.lr,
            betas=(0.9, 0.99),
            weight_decay=config.weight_decay,
        )
        self.lam = self.floor = config.lam_at(index, rounds)
        self.log: list[HealStep] = []

    def step(
        self, barrier: Barrier, k: int, epoch: int, total: int, reward: float | None = None
    ) -> None:
        """Take one of `total` optimiser steps on batch k of the barrier, and log it."""
        config, step = self.config, len(self.log)
        _set_lr(self.optimiser, config.lr, step, total)
        terms = barrier.backward(k, self.lam)
        norm = clip_gradient(self.adapter, config.max_grad_norm)
        self.optimiser.step()
        held = config.divergence != "none"
        weight = self.lam if held else 0.0
        self.log.append(
            HealStep(epoch, step, lam=weight, grad_adapter=norm, reward=reward, **terms)
        )
        if config.calibrate and held:
            self.lam = _next_lam(self.lam, terms["d"], config, self.floor)

    def state(self, texts: str, more: Mapping[str, Tensor] | None = None) -> "Training":
        """A copy of the state after the last step, with the digest of the texts; `more` are
        tensors that belong to it."""
        tensors = {name: x.detach().clone() for name, x in (more or {}).items()}
        for name, parameter in _parameters(self.adapter).items():
            tensors[name] = parameter.detach().clone()
            for key, value in self.optimiser.state[parameter].items():
                tensors[f"{name}.{key}"] = value.detach().clone()
        return Training(tensors, self.lam, tuple(self.log), texts)

    def restore(self, state: "Training", texts: str, more: Sequence[str] = ()) -> None:
        """Load a state with the tensors `more` into a trainer that has taken no step.

        Raises:
            ShlError: the state belongs to other texts or sites.
        """
        require(
            state.texts == texts,
            f"the training state was saved over other texts ({state.texts[:12]}, these are "
            f"{texts[:12]}).",
        )
        parameters = _parameters(self.adapter)
        wanted = {*parameters, *more}
        wanted |= {f"{name}.{key}" for name in parameters for key in _MOMENTS}
        require(
            set(state.tensors) == wanted
            and all(state.tensors[name].shape == p.shape for name, p in parameters.items()),
            f"the training state differs from the adapter at "
            f"{sorted(set(state.tensors) ^ wanted)[:3] or 'its shapes'}.",
        )
        for name, parameter in parameters.items():
            with torch.no_grad():
                parameter.copy_(state.tensors[name])
            moments = {key: state.tensors[f"{name}.{key}"].clone() for key in _MOMENTS}
            # AdamW counts its steps on the CPU.
            self.optimiser.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device)
                for key, value in moments.items()
            }
        self.lam = state.lam
        self.log += state.steps


def learnt(
    model: Model, completion: Completion, positions: str, persona: str | None = None
) -> tuple[Completion, Completion]:
    """A completion as the student learns it, and as the teacher with a persona reads it: the same
    tokens after the prompts of either.

    With `positions` "all" the prompt is learnt too, as far as it is the same with the persona, and
    what follows the last token; the soft target of a position does not depend on the token after
    it.
    """
    prompt = other = completion.prompt_tokens
    if persona is not None:
        other = tuple(encode(model, replace(completion.prompt, persona=persona)))
    tokens, shared = completion.tokens, 0
    if positions == "all":
        pairs = zip(prompt[:0:-1], other[:0:-1], strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        tokens = (*prompt[len(prompt) - shared :], *tokens, tokens[-1])
        prompt, other = prompt[: len(prompt) - shared], other[: len(other) - shared]
    doses = completion.doses
    if doses:
        doses = (doses[0],) * shared + doses + (doses[-1],) * (len(tokens) - shared - len(doses))
    student = replace(completion, prompt_tokens=prompt, tokens=tokens, doses=doses)
    return student, replace(student, prompt_tokens=other)


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
    """State of a training: factors and AdamW's moments, the barrier's next weight, all steps so
    far, and a digest of the completions."""

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
            ShlError: the file is missing, damaged, modified or of another format.
        """
        schema = {"lam": (float,), "steps": (list,), "texts": (str,)}
        meta, tensors = read_safetensors(path, FORMAT, schema)
        try:
            steps = tuple(
                replace(
                    HealStep(int(epoch), int(step), *map(float, rest)),
                    reward=None if reward is None else float(reward),
                )
                for epoch, step, *rest, reward in meta["steps"]
            )
            lam, texts = float(meta["lam"]), str(meta["texts"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ShlError(f"{path} holds no training state ({error}).") from error
        return cls(tensors, lam, steps, texts)


def digest(texts: Sequence[Completion]) -> str:
    """SHA-256 of the token ids of prompts and completions."""
    ids = [(list(c.prompt_tokens), list(c.tokens)) for c in texts]
    return hashlib.sha256(repr(ids).encode()).hexdigest()


_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""AdamW's state per parameter."""


def _parameters(adapter: Adapter) -> dict[str, Tensor]:
    factors = (("A", adapter.down), ("B", adapter.up))
    return {f"{s.name}.{x}": table[s.name] for s in adapter.sites for x, table in factors}


OnStep = Callable[[HealStep, int, Callable[[], Training]], None]
"""Called as `on_step(step, total, state)`; `state()` copies the state to continue from."""
