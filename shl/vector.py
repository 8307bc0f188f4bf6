"""Extracting steering vectors.

`v = mean(h+ - h-)` per layer, where h is the residual stream at the assistant tag (the last
prompt token) under the positive and the negative persona: contrastive activation addition,
Panickssery et al. 2023, arXiv:2312.06681. Raw, not normalised.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from transformer_lens import HookedTransformer

from shl.activations import residual_at_tag
from shl.axes import Axis
from shl.directions import SteeringVector
from shl.errors import check
from shl.fingerprint import dtype_of, name_of, weights_hash
from shl.rules import Rule, mean_difference, rule_name
from shl.sites import band
from shl.tokens import Prompt

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
    against: Literal["opposite", "nobody"] = "opposite",
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
        >>> from shl.axes import load_axis
        >>> from shl.tiny import tiny_gemma
        >>> v = extract_vector(tiny_gemma(), load_axis("love"), layers=[1], contexts=4)
        >>> v.directions[1].shape
        torch.Size([32])
    """
    layers = tuple(band(model, 1 / 3, 2 / 3) if layers is None else layers)
    contexts = len(axis.contexts) if contexts is None else contexts
    check(
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
        check(bool(torch.isfinite(v).all()), f"the vector of layer {layer} is not finite.")
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
