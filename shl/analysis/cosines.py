"""Norms of each round's steering vector, and its cosines with their null distributions."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from shl.analysis.weight_updates import NULL_COVERAGE
from shl.hooks.adapter import Adapter
from shl.hooks.bake import baked
from shl.hooks.handle import suspended
from shl.hooks.vector import SteeringVector
from shl.method.axes import NUISANCE, Axis, nuisance_axes
from shl.method.extract import extract_vector
from shl.models.activations import residual_at_tag
from shl.models.tokens import Prompt
from shl.utils.errors import require
from shl.utils.model import Model
from shl.utils.seeds import generator_for
from shl.utils.shapes import Direction, Float, Tensor

Rows = Float[Tensor, "n d_model"]
"""Residuals or their differences, one row per context."""
Draws = Float[Tensor, " draws"]
"""Cosines under a null hypothesis."""
States = Mapping[int, Rows]
"""Residuals at the assistant tag per layer, fp32."""


def random_cosines(
    reference: Direction, states: Rows, *, draws: int = 1000, seed: int = 0
) -> Draws:
    """Cosines between `reference` and normal random directions with the covariance of `states`.

    The null hypothesis is that any direction along which the stream varies is as close. A draw is
    sum_i z_i x_i with z normal and x the centred rows. Its covariance has rank n - 1 at most, so n
    should be well above the number of large principal components.

    Args:
        states: for instance residuals at one token of n prompts.

    Raises:
        ShlError: fewer than two rows, rows that do not differ, or a reference of zero.

    Example:
        >>> import torch
        >>> axes = torch.cat([torch.eye(50), -torch.eye(50)])  # the same in every direction
        >>> cosines = random_cosines(torch.ones(50), axes, draws=2000)
        >>> round(float((cosines**2).mean()), 2)  # 1 / 50
        0.02
    """
    require(len(states) >= 2, f"{len(states)} rows have no covariance, at least 2 are needed.")
    states = states.double()
    centred = states - states.mean(0)
    require(bool(centred.any()), "the rows do not differ, so they have no covariance.")
    z = torch.randn(draws, len(states), generator=generator_for(seed, "null"), dtype=torch.float64)
    return _cosines(reference, z @ centred)


def shuffled_cosines(
    reference: Direction, differences: Rows, *, draws: int = 1000, seed: int = 0
) -> Draws:
    """Cosines between `reference` and mean differences with shuffled persona labels.

    The null hypothesis is that the persona labels do not matter. Each draw exchanges the two
    personas in a random half of the contexts (an odd one is left out), which removes the mean
    difference exactly; independent flips would leave an unknown share of it.

    Args:
        differences: positive minus negative persona.

    Raises:
        ShlError: fewer than two contexts, differences that are all alike, or a reference of zero.

    Example:
        >>> import torch
        >>> cosines = shuffled_cosines(torch.tensor([1.0, 0, 0, 0]), torch.eye(4) + 100.0, draws=10)
        >>> sorted({round(float(c), 6) for c in cosines})  # four of +-1 each: 1 / sqrt(4)
        [-0.5, 0.5]
    """
    n = len(differences)
    require(n >= 2, f"the labels of {n} contexts cannot be shuffled, at least 2 are needed.")
    differences = differences.double()
    centred = differences - differences.mean(0)
    spread = float(torch.linalg.vector_norm(centred) / torch.linalg.vector_norm(differences))
    require(spread > 1e-6, "the differences are all alike, so shuffled labels leave nothing.")
    signs = torch.zeros(draws, n, dtype=torch.float64)
    order = torch.rand(draws, n, generator=generator_for(seed, "shuffle")).argsort(1)
    signs.scatter_(1, order[:, : n // 2], 1.0)
    signs.scatter_(1, order[:, n // 2 : 2 * (n // 2)], -1.0)
    return _cosines(reference, signs @ centred)


def bound(cosines: Draws) -> float:
    """The size below which a share `NULL_COVERAGE` of the cosines lies.

    Example:
        >>> import torch
        >>> round(bound(torch.linspace(-1, 1, 2001)), 3)
        0.95
    """
    return float(torch.quantile(cosines.abs(), NULL_COVERAGE))


def _cosines(reference: Direction, directions: Float[Tensor, "draws d_model"]) -> Tensor:
    reference = reference.double().cpu()
    require(bool(reference.any()), "the reference direction is 0, it has no cosine.")
    return torch.cosine_similarity(directions, reference[None], dim=1)


@dataclass(frozen=True, eq=False)
class Student:
    """Residuals of one round's student, all on the same contexts.

    `positive`, `negative` (the two personas) and `neutral` (no persona) are those of the student
    that enters the round; `healed` (after the round) and `base` (no adapter) are without persona.

    Example:
        >>> from shl.method.axes import load_axis
        >>> from shl.models.tiny import tiny_gemma
        >>> [student] = students(tiny_gemma(), load_axis("love"), [[]], [1], contexts=3)
        >>> float(student.shift(1).abs().max())  # a round without an adapter moves nothing
        0.0
    """

    positive: States
    negative: States
    neutral: States
    healed: States
    base: States

    def differences(self, layer: int) -> Rows:
        """Positive minus negative persona per context; their mean is the round's vector."""
        return self.positive[layer] - self.negative[layer]

    def shift(self, layer: int) -> Direction:
        """Mean of healed minus base: the shift internalised by the end of the round."""
        return (self.healed[layer] - self.base[layer]).mean(0)


def students(
    model: Model,
    axis: Axis,
    adapters: Sequence[Sequence[Adapter]],
    layers: Sequence[int],
    *,
    contexts: int,
    batch_size: int = 16,
) -> list[Student]:
    """Residuals of every round's student on the axis's contexts.

    Hooks of this package that are on the model are suspended meanwhile.

    Args:
        adapters: the adapters that each round added (one, or none).
        contexts: number of the axis's contexts that are used, from the first.

    Raises:
        ShlError: adapters that do not fit the model, or a layer that it does not have.
    """

    def states(persona: str | None) -> States:
        prompts = [Prompt(context, persona) for context in axis.contexts[:contexts]]
        return residual_at_tag(model, prompts, layers, batch_size=batch_size)

    out = []
    before: list[Adapter] = []
    with suspended(model):
        base = neutral = states(None)
        for added in adapters:
            with baked(model, before):
                positive, negative = states(axis.positive), states(axis.negative)
            before = [*before, *added]
            with baked(model, before):
                healed = states(None)
            out.append(Student(positive, negative, neutral, healed, base))
            neutral = healed
    return out


@dataclass(frozen=True)
class Cosine:
    """A cosine with the bounds of two null distributions (`bound`): `random_cosines` and
    `shuffled_cosines`. Both are None in a ledger that was made without a model.

    Example:
        >>> Cosine(0.5, random=0.3, shuffled=0.4).beyond_chance
        True
    """

    value: float
    random: float | None = None
    shuffled: float | None = None

    @property
    def beyond_chance(self) -> bool | None:
        """Whether the size is above both nulls; None without them."""
        if self.random is None or self.shuffled is None:
            return None
        return abs(self.value) > max(self.random, self.shuffled)


def nuisance_directions(
    model: Model, axis: Axis, layers: Sequence[int], *, contexts: int
) -> dict[str, SteeringVector]:
    """Base's vectors of the axes in `NUISANCE` other than `axis`, on its first contexts.

    Hooks of this package that are on the model are suspended meanwhile.

    Raises:
        ShlError: a layer is out of range, or the axis has fewer contexts.

    Example:
        >>> from shl.method.axes import load_axis
        >>> from shl.models.tiny import tiny_gemma
        >>> list(nuisance_directions(tiny_gemma(), load_axis("length"), [3], contexts=2))
        ['valence', 'formality']
    """
    names = [name for name in NUISANCE if name != axis.name]
    with suspended(model):
        return {
            other.name: extract_vector(model, other, layers, contexts=contexts)
            for other in nuisance_axes(axis, names)
        }


@dataclass(frozen=True)
class VectorEntry:
    """One layer of one round's steering vector.

    `norm` is in units of the residual stream, `relative_norm` its share of the mean norm of the
    entering student's residuals without persona, `shift_norm` that of `Student.shift`. All are
    taken at the assistant tag. `to_nuisance` has the cosine to each nuisance direction of base by
    its name. The last four are None or empty without a model. A cosine is None where either vector
    is missing or 0.
    """

    round: int
    layer: int
    norm: float
    to_first: Cosine | None
    to_previous: Cosine | None
    relative_norm: float | None = None
    shift_norm: float | None = None
    to_shift: Cosine | None = None
    to_nuisance: Mapping[str, Cosine | None] = field(default_factory=dict)


def vector_entries(
    vectors: Sequence[SteeringVector],
    found: Sequence[Student] | None = None,
    nuisance: Mapping[str, SteeringVector] | None = None,
    *,
    draws: int = 1000,
    seed: int = 0,
) -> Iterator[VectorEntry]:
    """One entry per round and layer.

    Args:
        vectors: one per round, in order.
        found: `students` of the same rounds; without them there are no nulls and no shift.
        nuisance: `nuisance_directions`.
        draws: random draws per null distribution.

    Raises:
        ShlError: too few contexts for a null, or contexts that are all alike.

    Example:
        >>> import torch
        >>> x, y = torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0])
        >>> vectors = [SteeringVector({1: v}, "tiny", "demo", 8) for v in (x, y)]
        >>> [round(e.to_first.value, 3) for e in vector_entries(vectors)]
        [1.0, 0.6]
    """

    def cosine(
        v: Direction, other: Direction | None, layer: int, student: Student | None
    ) -> Cosine | None:
        if other is None or not bool(other.any()) or not bool(v.any()):
            return None
        value = float(torch.cosine_similarity(v.cpu(), other.cpu(), dim=0))
        if student is None:
            return Cosine(value)
        # Each persona's mean is subtracted, so that the trait is not part of the variation.
        sides = (student.positive[layer], student.negative[layer])
        states = torch.cat([side - side.mean(0) for side in sides])
        random = random_cosines(other, states, draws=draws, seed=seed)
        shuffled = shuffled_cosines(other, student.differences(layer), draws=draws, seed=seed)
        return Cosine(value, bound(random), bound(shuffled))

    for index, vector in enumerate(vectors):
        student = found[index] if found else None
        for layer, v in sorted(vector.directions.items()):
            first = vectors[0].directions.get(layer)
            previous = vectors[index - 1].directions.get(layer) if index else None
            relative_norm = shift_norm = to_shift = None
            if student:
                relative_norm = float(v.norm()) / float(student.neutral[layer].norm(dim=1).mean())
                shift = student.shift(layer)
                shift_norm, to_shift = float(shift.norm()), cosine(v, shift, layer, student)
            yield VectorEntry(
                index,
                layer,
                float(v.norm()),
                cosine(v, first, layer, student),
                cosine(v, previous, layer, student),
                relative_norm,
                shift_norm,
                to_shift,
                {
                    name: cosine(v, other.directions.get(layer), layer, student)
                    for name, other in (nuisance or {}).items()
                },
            )
