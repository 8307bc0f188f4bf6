"""What each round's student holds at the assistant tag: with personas, and without."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformer_lens import HookedTransformer

from shl.activations import residual_at_tag
from shl.adapter import Adapter
from shl.axes import Axis
from shl.bake import baked
from shl.hooks import suspended
from shl.shapes import Float, Tensor
from shl.tokens import Prompt

States = Mapping[int, Float[Tensor, "n d_model"]]
"""Residuals at the assistant tag per layer, one row per context, fp32."""


@dataclass(frozen=True, eq=False)
class Student:
    """One round's residuals, all on the same contexts.

    `positive`, `negative` and `neutral` (no persona) are of the student that enters the round,
    `healed` is neutral too, of the one that leaves it, and `base` that of the model without any
    adapter.

    Example:
        >>> from shl.axes import load_axis
        >>> from shl.tiny import tiny_gemma
        >>> [student] = students(tiny_gemma(), load_axis("love"), [[]], [1], contexts=3)
        >>> float(student.shift(1).abs().max())  # a round without an adapter moves nothing
        0.0
    """

    positive: States
    negative: States
    neutral: States
    healed: States
    base: States

    def differences(self, layer: int) -> Float[Tensor, "n d_model"]:
        """Positive minus negative persona per context; their mean is the round's vector."""
        return self.positive[layer] - self.negative[layer]

    def shift(self, layer: int) -> Float[Tensor, " d_model"]:
        """Mean of healed minus base: what the student has made its own by the round's end."""
        return (self.healed[layer] - self.base[layer]).mean(0)


def students(
    model: HookedTransformer,
    axis: Axis,
    adapters: Sequence[Sequence[Adapter]],
    layers: Sequence[int],
    *,
    contexts: int,
    batch_size: int = 16,
) -> list[Student]:
    """Run the axis's contexts on the student of every round, without any other hook of ours.

    Args:
        adapters: per round, what it added (one adapter, or none).
        contexts: how many of the axis's contexts are used, from the first.

    Raises:
        ShlError: adapters that do not fit the model, or a layer that it does not have.
    """
    asked = axis.contexts[:contexts]

    def states(persona: str | None) -> States:
        prompts = [Prompt(context, persona) for context in asked]
        return residual_at_tag(model, prompts, layers, batch_size=batch_size)

    out = []
    with suspended(model):
        base = neutral = states(None)
        before: list[Adapter] = []
        for added in adapters:
            with baked(model, before):
                positive, negative = states(axis.positive), states(axis.negative)
            before = [*before, *added]
            with baked(model, before):
                healed = states(None)
            out.append(Student(positive, negative, neutral, healed, base))
            neutral = healed
    return out
