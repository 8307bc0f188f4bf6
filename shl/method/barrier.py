"""NLL and KL barrier of a batch of completions, and their gradients.

    loss = mean over completions of [ mean_t NLL_t + lam * relu(D - tau) ],
    D = aggregate over t of KL(student || reference) at position t

Only completion positions are unembedded. The gradients of both terms are computed separately at the
final hidden states, and their sum is propagated back through the model.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shl.config import HealConfig
from shl.hooks.adapter import Adapter, singular_value_penalty
from shl.hooks.handle import Handle, running, suspended
from shl.hooks.sites import readout
from shl.kl import (
    SoftTargets,
    aggregate,
    differentiable_nll,
    forward_kl_and_nll,
    logsumexp,
    reverse_kl_and_nll,
    soft_targets,
)
from shl.method.backtrack import at_own_doses
from shl.models.generate import Completion
from shl.models.nan_checks import NotFiniteError, require_finite
from shl.models.scores import completion_hidden, kl_values
from shl.utils.errors import halve, in_batches
from shl.utils.model import Model
from shl.utils.shapes import Hidden, PerToken

Reference = tuple[Hidden, PerToken]
"""The reference's hidden states at a batch's completion positions, and their log-sum-exp."""

Opened = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Teacher:
    """The model whose distributions are learnt: the student with steering, a persona or both.

    Attributes:
        steering: opens the steering: `partial(vector.steering, model, dose)`. A completion that
            was rewound is read at the dose of each of its tokens.
        persona: is put into the prompts that the teacher reads.
        opposite: opens the steering with the opposite sign. With it, the teacher's final hidden
            states are h + (h_plus - h_minus) / 2, where h are those of the student: what both signs
            have in common is not learnt.

    Example:
        >>> Teacher(persona="You are calm.").opposite is None
        True
    """

    steering: Opened = nullcontext
    persona: str | None = None
    opposite: Opened | None = None


class Barrier:
    """The training loss on batches of completions.

    The reference's hidden states depend on frozen weights only and are computed once. A batch is
    run `config.rows` completions at a time; that number is halved when the GPU runs out of memory.
    The KL's gradient is computed lazily (2 + 3 f products over the vocabulary for a share f of
    completions with D > tau) or eagerly (4), depending on f in the last step.

    Args:
        model: with the adapter attached.
        adapter: is trained.
        handle: the adapter's hooks.
        batches: completions, each with at least one token.
        read: the same completions as the teacher reads them, with its own prompt tokens.
        fired: share of completions with D > tau in the last step, 1 at the start.
        on_policy: the teacher is the model with the adapter on, and NLL_t is replaced by
            KL(student || teacher) instead of KL(teacher || student).
        weights: factor of each NLL_t in the gradient, for the tokens of each batch in order.
    """

    def __init__(
        self,
        model: Model,
        adapter: Adapter,
        handle: Handle,
        batches: Sequence[Sequence[Completion]],
        config: HealConfig,
        *,
        fired: float = 1.0,
        teacher: Teacher | None = None,
        read: Sequence[Sequence[Completion]] = (),
        on_policy: bool = False,
        weights: Sequence[PerToken] = (),
    ) -> None:
        self.model, self.adapter, self.batches, self.config = model, adapter, batches, config
        self._on_policy, self._weights = on_policy, weights
        self._rows = config.rows or config.batch_size
        self._fired = fired
        self._references: list[Reference] = []
        self._soft: list[SoftTargets] = []
        self._taught: list[Hidden] = []
        if config.divergence != "none" or config.clip is not None:
            # 'base' suspends every handle, 'prev' only that of the new adapter.
            paused = () if config.reference == "base" else (handle,)
            with torch.no_grad(), suspended(model, *paused):
                self._references = [self._reference(batch) for batch in batches]
        if teacher is not None:
            with nullcontext() if on_policy else suspended(model, handle):
                self._taught = self._teachers(teacher, read or batches)
            if not on_policy:
                self._soft = [soft_targets(x, model.W_U, **readout(model)) for x in self._taught]
                self._taught = []

    def _reference(self, batch: Sequence[Completion]) -> Reference:
        states = self._states(batch)
        return states, logsumexp(states, self.model.W_U, self.model.b_U)

    def _states(self, batch: Sequence[Completion]) -> Hidden:
        """Run as many rows at a time as in training, so a fresh adapter's KL is exactly 0."""
        parts: list[Hidden] = []

        def work(rows: list[int]) -> None:
            with running(rows=rows):
                hidden = completion_hidden(self.model, [batch[i] for i in rows])
            parts.append(hidden[self._picked(batch, rows)[0]])

        rows = torch.arange(len(batch)).split(self._rows)
        in_batches([part.tolist() for part in rows], work, "the reference")
        return torch.cat(parts)

    def _picked(self, batch: Sequence[Completion], rows: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Every n-th of the tokens of some rows, concatenated, from another one in each row; and
        how many each row has."""
        every, start, parts = self.config.every, 0, []
        for i in rows:
            count = len(batch[i].tokens)
            parts.append(torch.arange(start + i % min(every, count), start + count, every))
            start += count
        return torch.cat(parts).to(self.model.W_U.device), [len(part) for part in parts]

    @torch.no_grad()
    def _teachers(self, teacher: Teacher, read: Sequence[Sequence[Completion]]) -> list[Hidden]:
        """The teacher's final hidden states, from the student with the handles that are on."""
        model, clip, found = self.model, self.config.clip, []
        for k, batch in enumerate(read):
            with teacher.steering(), at_own_doses(model, batch):
                taught = self._states(batch)
            own = self._states(self.batches[k]) if clip or teacher.opposite else taught
            if teacher.opposite is not None:
                with teacher.opposite(), at_own_doses(model, batch):
                    taught = own + (taught - self._states(batch)) / 2
            if clip is not None:
                states, ref_lse = self._references[k]
                kl = kl_values(model, taught, states, ref_lse=ref_lse)
                share = (clip / kl.clamp(min=clip)).sqrt()
                taught = own + share[:, None] * (taught - own)
            found.append(taught)
        return found

    def backward(self, k: int, lam: float) -> dict[str, float]:
        """Set the adapter's gradient to that of batch k's loss; the loss's terms by their names in
        `shl.method.heal.HealStep`.

        Raises:
            NotFiniteError: a hidden state or a loss is not finite.
            ShlError: the GPU's memory is too small for a single completion.
        """
        size = len(self.batches[k])
        while True:
            for parameter in self.adapter.parameters():
                parameter.grad = None
            try:
                parts = [
                    self._part(k, range(i, min(i + self._rows, size)), lam)
                    for i in range(0, size, self._rows)
                ]
                break
            except torch.OutOfMemoryError:
                # Halve outside the handler: its traceback keeps the failed tensors alive.
                pass
            self._rows = halve(min(self._rows, size), "training")
        if self.config.sv_penalty > 0:
            (self.config.sv_penalty * singular_value_penalty(self.adapter)).backward()
        terms = {name: sum(part[name] for part in parts) for name in parts[0]}
        for norm in ("grad_nll", "grad_barrier"):
            terms[norm] = sum(part[norm] ** 2 for part in parts) ** 0.5
        nll, d = terms["nll"], terms["d"]
        if not math.isfinite(nll + d):
            raise NotFiniteError(f"the loss has NLL {nll} and D {d}, both must be finite.")
        self._fired = terms["fired"]
        return terms

    def _part(self, k: int, rows: range, lam: float) -> dict[str, float]:
        """Add the gradient of some rows of a batch; their contributions to the batch's terms."""
        model, config, whole = self.model, self.config, self.batches[k]
        batch = [whole[i] for i in rows]
        share = len(batch) / len(whole)
        _, every_size = self._picked(whole, range(len(whole)))
        before, total = sum(every_size[: rows.start]), sum(every_size)
        picked, sizes = self._picked(whole, rows)
        width = sum(sizes)
        hidden = completion_hidden(model, batch)[picked]
        require_finite(
            hidden.detach(),
            "a hidden state",
            model,
            lambda: [[*c.prompt_tokens, *c.tokens] for c in batch],
        )
        targets: Tensor | SoftTargets
        if self._soft:
            targets = self._soft[k][before : before + width]
        else:
            targets = torch.tensor([t for c in batch for t in c.tokens], device=hidden.device)
            targets = targets[picked]
        leaf = hidden.detach().requires_grad_(True)
        barrier = None
        if self.config.divergence == "none":
            if not self._taught:
                nll = differentiable_nll(leaf, model.W_U, targets, **readout(model))
            kl, d = (torch.zeros(n, device=leaf.device) for n in (width, len(batch)))
        else:
            states, ref_lse = (x[before : before + width] for x in self._references[k])
            kl, nll = self._divergence(leaf, states, ref_lse, targets)
            d = torch.stack([aggregate(part, config.aggregate) for part in kl.split(sizes)])
            barrier = lam * torch.relu(d - config.tau).mean()
        if self._taught:
            taught = self._taught[k][before : before + width]
            ids = torch.zeros(width, dtype=torch.long, device=leaf.device)
            nll, _ = reverse_kl_and_nll(leaf, taught, model.W_U, ids, **readout(model))
        logged = torch.stack([part.mean() for part in nll.detach().split(sizes)]).mean()
        if self._weights:
            offset = sum(len(c.tokens) for c in whole[: rows.start])
            nll = nll * self._weights[k][offset:].to(nll)[picked]
        nll_term = torch.stack([part.mean() for part in nll.split(sizes)]).mean()
        (grad_nll,) = torch.autograd.grad(nll_term, leaf, retain_graph=True)
        grad_barrier = torch.zeros_like(grad_nll)
        if barrier is not None:
            (grad_barrier,) = torch.autograd.grad(barrier, leaf)
        gradient = grad_nll + grad_barrier
        hidden.backward(gradient * share if share < 1 else gradient)
        return {
            "nll": share * float(logged),
            "d": share * float(d.detach().mean()),
            "fired": share * float((d > config.tau).float().mean()),
            "tokens_over": width / total * float((kl.detach() > config.tau).float().mean()),
            "grad_nll": share * float(grad_nll.norm()),
            "grad_barrier": share * float(grad_barrier.norm()),
        }

    def _divergence(
        self, student: Hidden, states: Hidden, ref_lse: PerToken, targets: Tensor | SoftTargets
    ) -> tuple[PerToken, PerToken]:
        model, output = self.model, readout(self.model)
        if self.config.divergence == "kl_fwd":
            return forward_kl_and_nll(student, states, model.W_U, targets, **output)
        lazy = self._fired < 2 / 3 and output["soft_cap"] == 0
        known = ref_lse if lazy else None
        return reverse_kl_and_nll(
            student, states, model.W_U, targets, **output, ref_lse=known, lazy=lazy
        )


def clip_gradient(adapter: Adapter, limit: float) -> float:
    """Scale the gradient of A and B down to a 2-norm of at most `limit`; the norm before scaling.

    Raises:
        NotFiniteError: a gradient is not finite.
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
