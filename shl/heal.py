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
from typing import Literal

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from shl.config import HealConfig
from shl.errors import ShlError, check
from shl.generate import Completion
from shl.hooks import suspended
from shl.kl import aggregate, differentiable_nll, forward_kl_and_nll, reverse_kl_and_nll
from shl.lora import Adapter, fresh_adapter, singular_value_penalty
from shl.scores import completion_hidden
from shl.seeds import generator_for
from shl.sites import readout
from shl.sweep import logsumexp
from shl.tokens import length_batches

Barrier = Literal["off", "never fired", "fired but did not bind", "bound"]


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
    on_step: Callable[[HealStep, int], None] | None = None,
) -> Healed:
    """`heal`, with the log of its steps; `index` of `rounds` places it in the lam schedule, and
    `axis` is for the adapter's file.

    `on_step(step, total)` is called after each optimiser step.
    """
    config = config or HealConfig()
    texts = [c for c in kept if c.tokens]
    check(len(texts) > 0, f"there is nothing to train on: {len(kept)} completions, all empty.")
    adapter = fresh_adapter(model, config, seed=seed, round=index, axis=axis)
    optimiser = torch.optim.AdamW(
        adapter.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay
    )
    batches = length_batches(
        [len(c.prompt_tokens) + len(c.tokens) for c in texts], config.batch_size
    )
    total = config.epochs * len(batches)
    floor = config.lam_at(index, rounds)
    lam = floor
    log: list[HealStep] = []
    with adapter.attach(model) as handle:
        references: list[tuple[Tensor, Tensor] | None] = [None] * len(batches)
        if config.divergence != "none":
            # The base gates every hook of ours, the previous student only the new adapter.
            gate = suspended(model) if config.reference == "base" else suspended(model, handle)
            with torch.no_grad(), gate:
                for k, batch in enumerate(batches):
                    states = completion_hidden(model, [texts[i] for i in batch])
                    references[k] = states, logsumexp(states, model.W_U, model.b_U)
        for epoch in range(config.epochs):
            order = torch.randperm(len(batches), generator=generator_for(seed, "order", epoch))
            for k in order.tolist():
                _set_lr(optimiser, config.lr, len(log), total)
                optimiser.zero_grad()
                own = [texts[i] for i in batches[k]]
                # Forming gradients on demand costs 2 + 3 f products for a share f of fired
                # completions, forming all of them 4; the last step predicts f.
                lazy = bool(log) and log[-1].fired < 2 / 3
                step = _step(model, adapter, own, references[k], config, lam, epoch, len(log), lazy)
                norm = torch.nn.utils.clip_grad_norm_(adapter.parameters(), config.max_grad_norm)
                where = f"round {index}, epoch {epoch}, step {len(log)}"
                for name, value in (("loss", step.nll + step.d), ("gradient", float(norm))):
                    if not math.isfinite(value):
                        raise ShlError(f"the {name} is {value} at {where}, it must be finite.")
                optimiser.step()
                log.append(HealStep(**{**vars(step), "grad_adapter": float(norm)}))
                if config.calibrate and config.divergence != "none":
                    lam = _next_lam(lam, step.d, config, floor)
                if on_step is not None:
                    on_step(log[-1], total)
    return Healed(adapter.frozen(), tuple(log), config)


def _step(
    model: HookedTransformer,
    adapter: Adapter,
    batch: Sequence[Completion],
    reference: tuple[Tensor, Tensor] | None,
    config: HealConfig,
    lam: float,
    epoch: int,
    step: int,
    lazy: bool,
) -> HealStep:
    """Forward and backward of one batch; gradients end in the adapter."""
    hidden = completion_hidden(model, batch)
    targets = torch.tensor([t for c in batch for t in c.tokens], device=hidden.device)
    sizes = [len(c.tokens) for c in batch]
    # The two terms' gradients are taken apart at the hidden states, where both are already
    # formed, and go through the model together.
    leaf = hidden.detach().requires_grad_(True)
    fire = torch.zeros(len(batch), device=hidden.device)
    d = torch.zeros(len(batch), device=hidden.device)
    kl = torch.zeros(len(targets), device=hidden.device)
    if reference is None:
        nll = differentiable_nll(leaf, model.W_U, targets, **readout(model))
    else:
        states, ref_lse = reference
        if config.divergence == "kl_fwd":
            kl, nll = forward_kl_and_nll(leaf, states, model.W_U, targets, **readout(model))
        else:
            kl, nll = reverse_kl_and_nll(
                leaf,
                states,
                model.W_U,
                targets,
                **readout(model),
                ref_lse=ref_lse if lazy else None,
                lazy=lazy,
            )
        d = torch.stack([aggregate(part, config.aggregate) for part in kl.split(sizes)])
        fire = (d > config.tau).float()
    nll_term = torch.stack([part.mean() for part in nll.split(sizes)]).mean()
    (grad_nll,) = torch.autograd.grad(nll_term, leaf, retain_graph=True)
    grad_barrier = torch.zeros_like(grad_nll)
    if reference is not None:
        barrier = lam * torch.relu(d - config.tau).mean()
        (grad_barrier,) = torch.autograd.grad(barrier, leaf)
    hidden.backward(grad_nll + grad_barrier)
    if config.sv_penalty > 0:
        (config.sv_penalty * singular_value_penalty(adapter)).backward()
    return HealStep(
        epoch=epoch,
        step=step,
        nll=float(nll_term.detach()),
        d=float(d.detach().mean()),
        lam=lam if reference is not None else 0.0,
        fired=float(fire.mean()),
        tokens_over=float((kl.detach() > config.tau).float().mean()),
        grad_nll=float(grad_nll.norm()),
        grad_barrier=float(grad_barrier.norm()),
        grad_adapter=0.0,
    )


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
