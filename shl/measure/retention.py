"""How much of a teacher's shift a student has, without any probe of the trait.

With logits u_t of the teacher and u_s of the student, both less those of the student that entered
the round, and the Fisher metric of base, <a, b> = Cov_p(a, b) under base's distribution p:

    beta = sum <u_s, u_t> / sum <u_t, u_t>                    the share of the shift
    rho  = sum <u_s, u_t> / sqrt(sum <u_s, u_s> sum <u_t, u_t>)   its cosine

The sums are over the tokens of texts. The metric is that of KL for small shifts: half of <a, a> is
the divergence. A student that is the teacher has beta = rho = 1, one that stayed has beta = 0.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from shl.hooks.handle import suspended
from shl.hooks.sites import readout
from shl.kl.divergence import fp32_log_probs
from shl.kl.sweep import product
from shl.models.generate import Completion
from shl.models.scores import completion_hidden
from shl.models.tokens import Prompt, encode, encode_text
from shl.utils.model import Model
from shl.utils.shapes import Float, Hidden, Unembed

ROWS = 32
"""Tokens whose logits are formed at a time; four `[ROWS, vocab]` tensors are in memory."""
MOST = 12
"""Tokens that are read of a text, from its first."""

Opened = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Retention:
    """Sums of <u_t, u_t>, <u_s, u_t> and <u_s, u_s> over the tokens of each text.

    Example:
        >>> half = Retention((4.0, 4.0), (2.0, 2.0), (1.0, 1.0))
        >>> half.share, half.cosine
        (0.5, 1.0)
    """

    teacher: tuple[float, ...]
    both: tuple[float, ...]
    student: tuple[float, ...]

    def by_source(self, names: Sequence[str]) -> "dict[str, Retention]":
        """The texts of each source, given the source's name for each text.

        Example:
            >>> Retention((4.0, 2.0), (2.0, 0.0), (1.0, 1.0)).by_source(["a", "b"])["b"].teacher
            (2.0,)
        """
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            rows.setdefault(name, []).append(row)
        columns = (self.teacher, self.both, self.student)
        return {
            name: Retention(*(tuple(column[row] for row in chosen) for column in columns))
            for name, chosen in rows.items()
        }

    @property
    def share(self) -> float:
        """beta; NaN where the teacher does not differ from the student that entered."""
        total = sum(self.teacher)
        return sum(self.both) / total if total else float("nan")

    @property
    def cosine(self) -> float:
        """rho; NaN where either does not differ."""
        total = (sum(self.teacher) * sum(self.student)) ** 0.5
        return sum(self.both) / total if total else float("nan")


@torch.no_grad()
def fisher_products(
    base: Hidden,
    entered: Hidden,
    teacher: Hidden,
    student: Hidden,
    unembed: Unembed,
    *,
    bias: Tensor | None = None,
    soft_cap: float = 0.0,
) -> Float[Tensor, "tok 3"]:
    """<u_t, u_t>, <u_s, u_t> and <u_s, u_s> per token, from final hidden states.

    Example:
        >>> h, w = torch.zeros(1, 2), torch.eye(2)
        >>> fisher_products(h, h, torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0]]), w)
        tensor([[1.0000, 0.5000, 0.2500]])
    """
    out = []
    unembed = unembed if unembed.is_cuda else unembed.float()  # one copy
    for parts in zip(*(x.split(ROWS) for x in (base, entered, teacher, student)), strict=True):
        at_base, before, *after = parts
        p = fp32_log_probs(at_base, unembed, bias, soft_cap).exp()
        if soft_cap > 0:
            start = fp32_log_probs(before, unembed, bias, soft_cap)
            moved = [fp32_log_probs(x, unembed, bias, soft_cap).sub_(start) for x in after]
        else:  # the bias and the normalisers drop out
            moved = [product(x.float() - before.float(), unembed) for x in after]
        u_t, u_s = (u.sub_((p * u).sum(1, keepdim=True)) for u in moved)
        products = ((p * a * b).sum(1) for a, b in ((u_t, u_t), (u_s, u_t), (u_s, u_s)))
        out.append(torch.stack(list(products), 1))
    return torch.cat(out)


@torch.no_grad()
def retention(
    model: Model,
    pairs: Sequence[tuple[Completion, Completion]],
    *,
    entered: Opened,
    steering: Callable[[Sequence[Completion]], AbstractContextManager[Any]],
    student: Opened,
) -> Retention:
    """Read the first tokens of each completion; the handles on the model are suspended.

    Args:
        pairs: each completion as the student and as the teacher reads it, with the teacher's own
            prompt tokens.
        entered: opens the student that entered the round, which the teacher is too.
        steering: opens the teacher's steering of the completions that it reads.
        student: opens the student after the round.

    Example:
        >>> from contextlib import nullcontext as base
        >>> from shl.models.generate import generate
        >>> from shl.models.tiny import tiny_gemma
        >>> model = tiny_gemma()
        >>> pairs = [(c, c) for c in generate(model, ["Hi?"], max_new_tokens=3, min_new_tokens=3)]
        >>> retention(model, pairs, entered=base, steering=base, student=base).student
        (0.0,)
    """
    own, read = (
        [replace(c, tokens=c.tokens[:MOST], doses=c.doses[:MOST]) for c in side]
        for side in zip(*pairs, strict=True)
    )
    with suspended(model):
        base = completion_hidden(model, own)
        with entered():
            before = completion_hidden(model, own)
            with steering(read):
                taught = completion_hidden(model, read)
        with student():
            learnt = completion_hidden(model, own)
    products = fisher_products(base, before, taught, learnt, model.W_U, **readout(model))
    products = products.double().cpu()
    sums = [part.sum(0).tolist() for part in products.split([len(c.tokens) for c in own])]
    return Retention(*(tuple(column) for column in zip(*sums, strict=True)))


def running_text(model: Model, text: str) -> Completion:
    """A text as a completion of its first word.

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> running_text(tiny_gemma(), "Today I feel").prompt.text
        'Today'
    """
    first, space, rest = text.partition(" ")
    prompt = Prompt(first, plain=True)
    tokens = encode_text(model, space + rest)
    return Completion(prompt, space + rest, tuple(tokens), tuple(encode(model, prompt)))
