"""Dose-response: divergence from base at each dose of a vector, in one batched call."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shl.hooks.handle import suspended
from shl.hooks.sites import readout
from shl.hooks.steering import Steering
from shl.hooks.vector import SteeringVector
from shl.kl import aggregate, logsumexp, reverse_kl_and_nll
from shl.models.generate import Completion
from shl.models.scores import completion_hidden
from shl.models.tokens import length_batches
from shl.utils.errors import require
from shl.utils.model import Model
from shl.utils.shapes import Float, PerToken, Tensor


@dataclass(frozen=True, eq=False)
class DoseResponse:
    """Per-token KL(steered || base), nats: `kl[i][j]` is `[tok]` for dose i on completion j.

    Example:
        >>> import torch
        >>> response = DoseResponse((0.0, 1.0), (((torch.zeros(2),), (torch.tensor([3.0, 4.0]),))))
        >>> [round(x, 2) for x in response.divergence("rmse")[:, 0].tolist()]
        [0.0, 3.54]
    """

    doses: tuple[float, ...]
    kl: tuple[tuple[PerToken, ...], ...]

    def divergence(self, how: str = "rmse") -> Float[Tensor, "dose completion"]:
        """One number D per dose and completion, nats: `mean`, `rmse`, `max` or `pNN`.

        Raises:
            ShlError: an unknown aggregate.
        """
        return torch.stack([torch.stack([aggregate(kl, how) for kl in row]) for row in self.kl])


def require_tokens(completions: Sequence[Completion]) -> None:
    """Raise `ShlError` without a completion, or if one has no tokens."""
    require(len(completions) > 0, "completions is empty, give at least one.")
    require(all(c.tokens for c in completions), "a completion without tokens has no divergence.")


@torch.no_grad()
def dose_response(
    model: Model,
    vector: SteeringVector,
    completions: Sequence[Completion],
    doses: Sequence[float],
    *,
    batch_size: int = 64,
) -> DoseResponse:
    """KL to base per dose over the same texts; all doses share the batches.

    Base is the model with this package's hooks suspended; adapters that are on stay on under the
    vector, and dose 0 then gives their divergence.

    Args:
        completions: results of `generate`; prompts and padding are left out.
        doses: multiples of the vector, in any order; 0 and negative ones are allowed.
        batch_size: rows (completions times doses) in one forward pass.

    Raises:
        ShlError: no dose, no completion, one without tokens, or a dose that is not finite.

    Example:
        >>> import shl
        >>> model = shl.tiny.tiny_gemma()
        >>> texts = shl.generate(model, ["Hello?"], max_new_tokens=4, min_new_tokens=4)
        >>> vector = shl.extract_vector(model, shl.load_axis("love"), contexts=4)
        >>> d = dose_response(model, vector, texts, [0.0, 0.5, 1.0]).divergence()
        >>> bool(d[0, 0] < 1e-5 < d[1, 0] < d[2, 0])
        True
    """
    require(len(doses) > 0, "doses is empty, name at least one.")
    require_tokens(completions)
    with suspended(model):
        hidden = completion_hidden(model, completions)
    sizes = [len(c.tokens) for c in completions]
    lse = logsumexp(hidden, model.W_U, model.b_U).split(sizes)
    base = hidden.split(sizes)
    texts = [j for _ in doses for j in range(len(completions))]
    amounts = torch.tensor(doses, dtype=torch.float64).repeat_interleave(len(completions))
    kl: dict[int, PerToken] = {}
    lengths = [len(completions[j].prompt_tokens) + sizes[j] for j in texts]
    for rows in length_batches(lengths, batch_size):
        chosen = [texts[row] for row in rows]
        with Steering(model, vector.directions, amounts[rows]):
            steered = completion_hidden(model, [completions[j] for j in chosen])
        ref, ref_lse = (torch.cat([x[j] for j in chosen]) for x in (base, lse))
        targets = torch.cat([torch.tensor(completions[j].tokens) for j in chosen])
        settings = {"ref_lse": ref_lse, "lazy": True, **readout(model)}
        values, _ = reverse_kl_and_nll(
            steered, ref, model.W_U, targets.to(steered.device), **settings
        )
        kl |= zip(rows, values.cpu().split([sizes[j] for j in chosen]), strict=True)
    n = len(completions)
    table = tuple(tuple(kl[i * n + j] for j in range(n)) for i in range(len(doses)))
    return DoseResponse(tuple(map(float, doses)), table)
