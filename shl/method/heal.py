"""Heal: train a fresh adapter on kept completions while a KL barrier keeps it coherent.

    loss = mean over completions of [ mean_t NLL_t + lam * relu(D - tau) ],
    D = aggregate over t of KL(student || reference) at position t

Only completion positions are unembedded. The reference's hidden states depend on frozen things
alone, so they are computed once. lam follows its schedule as a floor and is raised by dual ascent
while D stays above tau: the method of multipliers for the constraint D <= tau (Boyd and
Vandenberghe 2004, section 5), in the log so that lam stays positive.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from shl.config import HealConfig
from shl.hooks.adapter import Adapter, fresh_adapter, singular_value_penalty
from shl.hooks.handle import suspended
from shl.hooks.lora import LowRank
from shl.hooks.sites import readout
from shl.kl import aggregate, differentiable_nll, forward_kl_and_nll, logsumexp, reverse_kl_and_nll
from shl.models.generate import Completion
from shl.models.nan_checks import NotFiniteError, named, require_finite
from shl.models.scores import completion_hidden
from shl.models.tokens import length_batches
from shl.utils.errors import ShlError, halve, in_batches, require
from shl.utils.files import read_safetensors, write_safetensors
from shl.utils.seeds import generator_for
from shl.utils.shapes import Hidden, PerToken

Reference = tuple[Hidden, PerToken]
"""The reference's hidden states at a batch's completion positions, and their log-sum-exp."""


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
class Terms:
    """What a batch's forward and backward gave, before clipping."""

    nll: float
    d: float
    fired: float
    tokens_over: float
    grad_nll: float
    grad_barrier: float


def backward(
    model: HookedTransformer,
    adapter: Adapter,
    batch: Sequence[Completion],
    reference: Reference | None,
    config: HealConfig,
    lam: float,
    *,
    lazy: bool,
    rows: int,
) -> tuple[Terms, int]:
    """Give the adapter the loss's gradient, `rows` completions at a time: fewer if the GPU's
    memory is too small.

    Returns:
        The terms, and how many completions fitted at a time.

    Raises:
        NotFiniteError: hidden states or losses that are not finite, with the site.
        ShlError: one completion alone does not fit.
    """
    while True:
        for parameter in adapter.parameters():
            parameter.grad = None
        try:
            found = [
                _part(
                    model,
                    batch,
                    range(start, min(start + rows, len(batch))),
                    reference,
                    config,
                    lam,
                    lazy,
                )
                for start in range(0, len(batch), rows)
            ]
            break
        except torch.OutOfMemoryError:
            # Halved outside the handler, whose traceback keeps the failed tensors alive.
            pass
        rows = halve(min(rows, len(batch)), "training")
    if config.sv_penalty > 0:
        (config.sv_penalty * singular_value_penalty(adapter)).backward()
    terms = _joined(found)
    if not math.isfinite(terms.nll + terms.d):
        raise NotFiniteError(f"the loss has NLL {terms.nll} and D {terms.d}, both must be finite.")
    return terms, rows


def _part(
    model: HookedTransformer,
    whole: Sequence[Completion],
    rows: range,
    reference: Reference | None,
    config: HealConfig,
    lam: float,
    lazy: bool,
) -> tuple[float, float, Terms]:
    """Some rows of a batch: their share of its completions and of its tokens, and their terms."""
    batch = [whole[i] for i in rows]
    share = len(batch) / len(whole)
    before, width, total = (
        sum(len(c.tokens) for c in part) for part in (whole[: rows.start], batch, whole)
    )
    hidden = completion_hidden(model, batch)
    require_finite(
        hidden.detach(),
        "a hidden state",
        model,
        lambda: [[*c.prompt_tokens, *c.tokens] for c in batch],
    )
    targets = torch.tensor([t for c in batch for t in c.tokens], device=hidden.device)
    sizes = [len(c.tokens) for c in batch]
    leaf = hidden.detach().requires_grad_(True)
    fire = torch.zeros(len(batch), device=hidden.device)
    d = torch.zeros(len(batch), device=hidden.device)
    kl = torch.zeros(len(targets), device=hidden.device)
    if reference is None:
        nll = differentiable_nll(leaf, model.W_U, targets, **readout(model))
    else:
        states, ref_lse = (x[before : before + width] for x in reference)
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
    hidden.backward((grad_nll + grad_barrier) * share if share < 1 else grad_nll + grad_barrier)
    terms = Terms(
        nll=float(nll_term.detach()),
        d=float(d.detach().mean()),
        fired=float(fire.mean()),
        tokens_over=float((kl.detach() > config.tau).float().mean()),
        grad_nll=share * float(grad_nll.norm()),
        grad_barrier=share * float(grad_barrier.norm()),
    )
    return share, width / total, terms


def _joined(parts: Sequence[tuple[float, float, Terms]]) -> Terms:
    """Means over completions (over tokens, for the share of tokens); norms over all of them."""
    if len(parts) == 1:
        return parts[0][2]
    return Terms(
        nll=sum(share * t.nll for share, _, t in parts),
        d=sum(share * t.d for share, _, t in parts),
        fired=sum(share * t.fired for share, _, t in parts),
        tokens_over=sum(tokens * t.tokens_over for _, tokens, t in parts),
        grad_nll=sum(t.grad_nll**2 for *_, t in parts) ** 0.5,
        grad_barrier=sum(t.grad_barrier**2 for *_, t in parts) ** 0.5,
    )


def gradient_norm(adapter: Adapter, limit: float) -> float:
    """Scale the gradient of A and B down to a 2-norm of `limit`; the norm before that.

    Raises:
        NotFiniteError: a gradient that is not finite, with its site.
    """
    gradients = [p.grad for p in adapter.parameters() if p.grad is not None]
    total = torch.nn.utils.get_total_norm(gradients)
    norm = float(total)
    if math.isfinite(norm):
        torch.nn.utils.clip_grads_with_norm_(adapter.parameters(), limit, total)
        return norm
    for site in adapter.sites:
        for factor, table in (("A", adapter.down), ("B", adapter.up)):
            grad: Tensor | None = table[site.name].grad
            if grad is not None and not bool(torch.isfinite(grad).all()):
                raise NotFiniteError(
                    f"the gradient of {factor} at {site.name} is not finite, it must be."
                )
    raise NotFiniteError(f"the gradient's norm is {norm}, it must be finite.")


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
        >>> from shl.models.generate import generate
        >>> from shl.models.tiny import tiny_gemma
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
