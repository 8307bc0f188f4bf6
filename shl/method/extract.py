"""Steering vectors from a persona pair, and the random control that moves the model as far."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from shl.hooks.fingerprint import dtype_of, name_of, weights_hash
from shl.hooks.sites import band
from shl.hooks.steering import Steering
from shl.hooks.vector import SteeringVector
from shl.kl import logsumexp
from shl.method.axes import Axis
from shl.models.activations import residual_at_tag
from shl.models.generate import generate
from shl.models.scores import completion_hidden, kl_values
from shl.models.tokens import Prompt
from shl.utils.errors import require
from shl.utils.seeds import generator_for
from shl.utils.shapes import Direction

Rule = Callable[[Float[Tensor, "n d_model"], Float[Tensor, "n d_model"]], Direction]


def mean_difference(
    positive: Float[Tensor, "n d_model"], negative: Float[Tensor, "n d_model"]
) -> Direction:
    """The default extraction rule, `[n, d_model]` twice to `[d_model]`.

    Example:
        >>> import torch
        >>> mean_difference(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
        tensor([2., 0.])
    """
    return reduce(positive - negative, "n d_model -> d_model", "mean")


def first_component(
    positive: Float[Tensor, "n d_model"], negative: Float[Tensor, "n d_model"]
) -> Direction:
    """First principal component of the differences (uncentred), in the direction and at the size
    of their mean along it (Zou et al. 2023, arXiv:2310.01405, section 3.1).

    Example:
        >>> import torch
        >>> first_component(torch.tensor([[3.0, 0.0], [5.0, 0.0]]), torch.zeros(2, 2))
        tensor([4., 0.])
    """
    differences = positive - negative
    component = torch.linalg.svd(differences, full_matrices=False).Vh[0]
    return component * (differences @ component).mean()


def rule_name(rule: Rule) -> str:
    """What a file calls a rule: its function's name.

    Example:
        >>> rule_name(mean_difference)
        'mean_difference'
    """
    return str(getattr(rule, "__name__", type(rule).__name__))


TOKEN = "last prompt token"


def extract_vector(
    model: HookedTransformer,
    axis: Axis,
    layers: Sequence[int] | None = None,
    *,
    contexts: int | None = None,
    batch_size: int = 16,
    rule: Rule = mean_difference,
    round: int | None = None,
    against: Literal["opposite", "no_persona"] = "opposite",
) -> SteeringVector:
    """The axis's steering vector on the model as it stands, hooks included.

    Args:
        layers: the band; None is the middle third.
        contexts: how many of the axis's contexts are used, from the first; None is all.
        rule: `(positive, negative) -> direction`, each `[n, d_model]`, row i of both from
            context i.
        round: where in a loop it is taken, for its file.
        against: the other side of the contrast, the opposite persona or the question alone.

    Raises:
        ShlError: a layer out of range, more contexts than the axis has, or residuals that are
            not finite.

    Example:
        >>> from shl.method.axes import load_axis
        >>> from shl.models.tiny import tiny_gemma
        >>> v = extract_vector(tiny_gemma(), load_axis("love"), layers=[1], contexts=4)
        >>> v.directions[1].shape
        torch.Size([32])
    """
    layers = tuple(band(model, 1 / 3, 2 / 3) if layers is None else layers)
    contexts = len(axis.contexts) if contexts is None else contexts
    require(
        1 <= contexts <= len(axis.contexts),
        f"contexts is {contexts}, axis {axis.name!r} has {len(axis.contexts)}.",
    )
    sides = [
        residual_at_tag(
            model,
            [Prompt(context, persona) for context in axis.contexts[:contexts]],
            layers,
            batch_size=batch_size,
        )
        for persona in (axis.positive, axis.negative if against == "opposite" else None)
    ]
    directions = {}
    for layer in sorted(set(layers)):
        v = rule(sides[0][layer], sides[1][layer])
        require(bool(torch.isfinite(v).all()), f"the vector of layer {layer} is not finite.")
        directions[layer] = v
    return SteeringVector(
        directions,
        name_of(model),
        axis.name,
        contexts,
        weights_hash(model),
        dtype_of(model),
        rule_name(rule),
        TOKEN,
        round,
    )


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
        >>> from shl.models.tiny import tiny_gemma
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

    def divergence(directions: Mapping[int, Direction]) -> float:
        with Steering(model, directions, dose):
            hidden = completion_hidden(model, texts)
        return float(kl_values(model, hidden, reference, ref_lse=ref_lse).double().mean())

    aim = divergence(vector.directions)
    require(
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
    require(
        abs(found - aim) <= CLOSE * aim,
        f"random directions give {found:.4g} nats per token at dose {dose:g}, the vector gives "
        f"{aim:.4g}; no scale up to {RANGE:g} times its norms comes within {CLOSE:.0%}.",
    )
    return replace(vector, directions=scaled, rule="random")
