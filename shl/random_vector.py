"""The control for a steering vector: random directions that take the model just as far."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from transformer_lens import HookedTransformer

from shl.directions import SteeringVector
from shl.errors import check
from shl.generate import generate
from shl.kl import logsumexp, reverse_kl_and_nll
from shl.scores import completion_hidden
from shl.seeds import generator_for
from shl.shapes import Direction
from shl.sites import readout
from shl.steering import Steering

RANGE = 16.0
"""Scales from 1 / RANGE to RANGE times the vector's own norms are tried."""
HALVINGS = 10
"""Bisections of that range in the log: 16 to the power of 2 / 2**10, half a per cent."""
SMALLEST = 1e-5
"""Mean KL below which it is mostly rounding [nats]."""
CLOSE = 0.1
"""Largest relative distance between the two divergences."""


@torch.no_grad()
def random_like(
    model: HookedTransformer,
    vector: SteeringVector,
    prompts: Sequence[str],
    *,
    dose: float = 1.0,
    tokens: int = 24,
    seed: int = 0,
) -> SteeringVector:
    """Normal random directions at the layers of `vector`, matched to it in divergence.

    Each layer's direction has the norm of the vector's there times one common scale, found by
    bisection so that the mean KL per token of the steered model to the same model without
    steering, over that model's own greedy answers, is that of `vector` at `dose`. What a trait
    reading does under it is what any push of that size does.

    Args:
        prompts: questions whose answers the divergence is taken over.
        dose: where the two are matched, multiples of the vector.
        tokens: length of these answers.

    Raises:
        ShlError: the vector hardly moves the model at that dose, or no scale within 16 times
            its norms comes within a tenth of its divergence.

    Example:
        >>> import torch
        >>> from shl.tiny import tiny_gemma
        >>> v = SteeringVector({1: torch.ones(32)}, "tiny", "demo", 1)
        >>> control = random_like(tiny_gemma(), v, ["Hello?"], tokens=4)
        >>> control.rule, control.directions[1].shape
        ('random', torch.Size([32]))
    """
    draws = {
        layer: torch.randn(len(v), generator=generator_for(seed, "direction", layer))
        for layer, v in vector.directions.items()
    }
    unit = {
        layer: (draws[layer] / draws[layer].norm()).to(v) * v.norm()
        for layer, v in vector.directions.items()
    }
    texts = [
        text
        for text in generate(
            model, prompts, max_new_tokens=tokens, min_new_tokens=1, temperature=0.0
        )
        if text.tokens
    ]
    reference = completion_hidden(model, texts)
    ref_lse = logsumexp(reference, model.W_U, model.b_U)
    targets = torch.tensor([t for text in texts for t in text.tokens], device=reference.device)

    def divergence(directions: Mapping[int, Direction]) -> float:
        with Steering(model, directions, dose):
            hidden = completion_hidden(model, texts)
        kl, _ = reverse_kl_and_nll(
            hidden, reference, model.W_U, targets, ref_lse=ref_lse, lazy=True, **readout(model)
        )
        return float(kl.double().mean())

    aim = divergence(vector.directions)
    check(
        aim > SMALLEST,
        f"the vector takes the model {aim:.2g} nats per token away at dose {dose:g}, which is too "
        f"little to match (at least {SMALLEST:g}).",
    )
    low, high = 1 / RANGE, RANGE
    scaled, found = dict(unit), 0.0
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        scaled = {layer: middle * v for layer, v in unit.items()}
        found = divergence(scaled)
        if abs(found - aim) <= 0.01 * aim:
            break
        low, high = (middle, high) if found < aim else (low, middle)
    check(
        abs(found - aim) <= CLOSE * aim,
        f"random directions give {found:.4g} nats per token at dose {dose:g}, the vector gives "
        f"{aim:.4g}; no scale up to {RANGE:g} times its norms comes within {CLOSE:.0%}.",
    )
    return replace(vector, directions=scaled, rule="random")
