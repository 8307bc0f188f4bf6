"""Heal: train a fresh adapter on kept completions while a KL barrier keeps it coherent.

    loss = mean over completions of [ mean_t NLL_t + lam * relu(D - tau) ],
    D = aggregate over t of KL(student || reference) at position t

Only completion positions are unembedded. The reference's hidden states depend on frozen things
alone, so they are computed once. lam follows its schedule as a floor and is raised by dual ascent
while D stays above tau: the method of multipliers for the constraint D <= tau (Boyd and
Vandenberghe 2004, section 5), in the log so that lam stays positive.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from transformer_lens import HookedTransformer

from shl.config import HealConfig
from shl.errors import check
from shl.finite import named
from shl.generate import Completion
from shl.halving import in_batches
from shl.heal_step import HealStep, Reference, backward, gradient_norm
from shl.hooks import suspended
from shl.lora import Adapter, fresh_adapter
from shl.low_rank import LowRank
from shl.scores import completion_hidden
from shl.seeds import generator_for
from shl.shapes import Hidden
from shl.sweep import logsumexp
from shl.tokens import length_batches
from shl.training import Training, restore, snapshot

Barrier = Literal["off", "never fired", "fired but did not bind", "bound"]
OnStep = Callable[[HealStep, int, Callable[[], Training]], None]
"""Called as `on_step(step, total, state)`; `state()` is what training needs to go on from here."""


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
    def barrier(self) -> Barrier:
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
) -> Adapter:
    """Train one adapter on kept completions, on top of whatever is on the model.

    Args:
        kept: their prompt tokens are context only, their own tokens are learnt.

    Returns:
        A frozen adapter, for `baked(model, [adapter])`.

    Raises:
        ShlError: nothing to train on, or a loss that is not finite.

    Example:
        >>> from shl.generate import generate
        >>> from shl.tiny import tiny_gemma
        >>> model = tiny_gemma()
        >>> kept = generate(model, ["Hello?"], max_new_tokens=8)
        >>> adapter = heal(model, kept, HealConfig(rank=2, epochs=1))
        >>> adapter.scale
        8.0
    """
    return train_adapter(model, kept, config, seed=seed).adapter


def train_adapter(
    model: HookedTransformer,
    kept: Sequence[Completion],
    config: HealConfig | None = None,
    *,
    index: int = 0,
    rounds: int = 1,
    seed: int = 0,
    axis: str | None = None,
    on_step: OnStep | None = None,
    resume: Training | None = None,
) -> Healed:
    """`heal`, with the log of its steps; `index` of `rounds` places it in the lam schedule, and
    `axis` is for the adapter's file.

    Args:
        on_step: called after each optimiser step.
        resume: a state that `on_step` was given in an earlier process, by the same call; training
            goes on from there and ends with the same bits.
    """
    config = config or HealConfig()
    texts = [c for c in kept if c.tokens]
    check(len(texts) > 0, f"there is nothing to train on: {len(kept)} completions, all empty.")
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
    rows = config.rows or config.batch_size
    with adapter.attach(model) as handle:
        references = _references(model, handle, batches, config, rows)
        for step in range(len(log), total):
            epoch, place = divmod(step, len(batches))
            order = torch.randperm(len(batches), generator=generator_for(seed, "order", epoch))
            k = int(order[place])
            # Forming gradients on demand costs 2 + 3 f products for a share f of fired
            # completions, forming all of them 4; the last step predicts f.
            lazy = bool(log) and log[-1].fired < 2 / 3
            _set_lr(optimiser, config.lr, step, total)
            with named(f"epoch {epoch}, step {step}"):
                terms, rows = backward(
                    model, adapter, batches[k], references[k], config, lam, lazy=lazy, rows=rows
                )
                norm = gradient_norm(adapter, config.max_grad_norm)
            optimiser.step()
            weight = 0.0 if references[k] is None else lam
            log.append(HealStep(epoch, step, lam=weight, grad_adapter=norm, **vars(terms)))
            if config.calibrate and config.divergence != "none":
                lam = _next_lam(lam, terms.d, config, floor)
            if on_step is not None:
                on_step(log[-1], total, partial(snapshot, adapter, optimiser, lam, log, texts))
    return Healed(adapter.frozen(), tuple(log), config)


@torch.no_grad()
def _references(
    model: HookedTransformer,
    handle: LowRank,
    batches: Sequence[Sequence[Completion]],
    config: HealConfig,
    rows: int,
) -> list[Reference] | list[None]:
    """Of each batch, none if nothing is compared; as many rows at a time as in training, so that
    an untrained student differs from it in no bit."""
    if config.divergence == "none":
        return [None] * len(batches)
    # The base gates every hook of ours, the previous student only the new adapter.
    with suspended(model) if config.reference == "base" else suspended(model, handle):
        return [_reference(model, batch, rows) for batch in batches]


def _reference(model: HookedTransformer, batch: Sequence[Completion], rows: int) -> Reference:
    parts: list[Hidden] = []

    def work(part: list[int]) -> None:
        parts.append(completion_hidden(model, [batch[i] for i in part]))

    each = [list(range(len(batch)))[at : at + rows] for at in range(0, len(batch), rows)]
    in_batches(each, work, "the reference")
    states = torch.cat(parts)
    return states, logsumexp(states, model.W_U, model.b_U)


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
