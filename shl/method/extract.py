"""Steering vectors from a pair of personas."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from shl.config import VectorConfig
from shl.hooks.fingerprint import dtype_of, name_of, weights_hash
from shl.hooks.sites import band
from shl.hooks.vector import SteeringVector
from shl.method.axes import Axis, nuisance_axes
from shl.models.activations import residual_at_tag
from shl.models.tokens import Prompt
from shl.utils.errors import require
from shl.utils.model import Model
from shl.utils.seeds import generator_for
from shl.utils.shapes import Direction

Rule = Callable[[Float[Tensor, "n d_model"], Float[Tensor, "n d_model"]], Direction]


def mean_difference(
    positive: Float[Tensor, "n d_model"], negative: Float[Tensor, "n d_model"]
) -> Direction:
    """Mean of the differences, the default extraction rule.

    Example:
        >>> import torch
        >>> mean_difference(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
        tensor([2., 0.])
    """
    return reduce(positive - negative, "n d_model -> d_model", "mean")


def first_component(
    positive: Float[Tensor, "n d_model"], negative: Float[Tensor, "n d_model"]
) -> Direction:
    """First principal component of the differences (uncentred), scaled by their mean projection
    onto it (Zou et al. 2023, arXiv:2310.01405, section 3.1).

    Example:
        >>> import torch
        >>> first_component(torch.tensor([[3.0, 0.0], [5.0, 0.0]]), torch.zeros(2, 2))
        tensor([4., 0.])
    """
    differences = positive - negative
    component = torch.linalg.svd(differences, full_matrices=False).Vh[0]
    return component * (differences @ component).mean()


def extract_vector(
    model: Model,
    axis: Axis,
    layers: Sequence[int] | None = None,
    *,
    contexts: int | None = None,
    batch_size: int = 16,
    rule: Rule = mean_difference,
    round: int | None = None,
    against: Literal["opposite", "no_persona"] = "opposite",
    remove: Sequence[str] = (),
) -> SteeringVector:
    """Extract an axis's steering vector from the model with the hooks that are on.

    Args:
        layers: layers of the vector; None is the middle third.
        contexts: number of the axis's contexts to use, from the first; None is all.
        rule: `(positive, negative) -> direction`; row i of both is from context i.
        round: round of the loop, for the vector's file.
        against: the negative side, the opposite persona or the question alone.
        remove: built-in axes whose vectors, of opposite personas on the same contexts, are
            projected out at each layer; the vector's `rule` says so.

    Raises:
        ShlError: a layer is out of range, the axis has fewer contexts, residuals are not finite, an
            axis to remove is unknown or the axis itself, or nothing is left without them.

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
    positive, negative = (
        residual_at_tag(
            model,
            [Prompt(context, persona) for context in axis.contexts[:contexts]],
            layers,
            batch_size=batch_size,
        )
        for persona in (axis.positive, axis.negative if against == "opposite" else None)
    )
    directions = {layer: rule(positive[layer], negative[layer]) for layer in sorted(set(layers))}
    for layer, v in directions.items():
        require(bool(torch.isfinite(v).all()), f"the vector of layer {layer} is not finite.")
    vector = SteeringVector(
        directions,
        name_of(model),
        axis.name,
        contexts,
        weights_hash(model),
        dtype_of(model),
        rule=getattr(rule, "__name__", type(rule).__name__),
        token="last prompt token",
        round=round,
    )
    if not remove:
        return vector
    names = ", ".join(remove)
    others = [
        extract_vector(
            model, other, layers, contexts=contexts, batch_size=batch_size, rule=rule, round=round
        )
        for other in nuisance_axes(axis, remove)
    ]
    left = vector.project_out(*others)
    for layer, norm in left.norms().items():
        require(
            norm > VANISHED * vector.norms()[layer],
            f"nothing of the vector of layer {layer} is left without {names}.",
        )
    return replace(left, axis=axis.name, rule=f"{vector.rule} without {names}")


def extract_configured(
    model: Model, axis: Axis, config: VectorConfig, *, seed: int, round: int | None = None
) -> SteeringVector:
    """Extract an axis's vector as `extract_vector` does, with the settings of a study.

    Args:
        seed: of the study; it draws the contexts from those of the axis, the same in every round.

    Example:
        >>> from shl.method.axes import load_axis
        >>> from shl.models.tiny import tiny_gemma
        >>> config = VectorConfig(contexts=4, layers=(1,))
        >>> extract_configured(tiny_gemma(), load_axis("love"), config, seed=42).contexts
        4
    """
    order = torch.randperm(len(axis.contexts), generator=generator_for(seed, "contexts"))
    return extract_vector(
        model,
        replace(axis, contexts=tuple(axis.contexts[i] for i in order)),
        config.layers,
        contexts=config.contexts,
        batch_size=config.batch_size,
        round=round,
        against=config.against,
        remove=config.remove,
    )


VANISHED = 1e-4
"""A smaller share of a vector's norm is rounding error."""
