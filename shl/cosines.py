"""Each round's steering vector in numbers: norms, and cosines beside what chance gives."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from shl.directions import SteeringVector
from shl.nulls import bound, random_cosines, shuffled_cosines
from shl.shapes import Direction
from shl.students import Student


@dataclass(frozen=True)
class Cosine:
    """A cosine, and what 95 % of chance stays below in size: random directions with the
    covariance of the residuals, and the same contexts with shuffled persona labels (see
    `shl.nulls`). Both are None in a ledger that was made without a model.

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


@dataclass(frozen=True)
class VectorEntry:
    """One layer of one round's steering vector.

    `norm` is in units of the residual stream, `relative_norm` its share of the mean norm of the
    entering student's residuals without persona; `shift_norm` is that of the internalised shift,
    the mean of healed minus base residuals without persona, after the round. All at the assistant
    tag; None where there was no model. A cosine of or to what is missing or 0 is None, as
    `to_previous` is in the first round.
    """

    round: int
    layer: int
    norm: float
    to_first: Cosine | None
    to_previous: Cosine | None
    relative_norm: float | None = None
    shift_norm: float | None = None
    to_shift: Cosine | None = None


def vector_entries(
    vectors: Sequence[SteeringVector],
    found: Sequence[Student] | None = None,
    *,
    draws: int = 1000,
    seed: int = 0,
) -> Iterator[VectorEntry]:
    """One entry per round and layer.

    Args:
        vectors: one per round, in order.
        found: `students` of the same rounds; without them there are no nulls and no shift.
        draws: random draws behind each null.

    Raises:
        ShlError: too few contexts for a null, or contexts that are all alike.

    Example:
        >>> import torch
        >>> x, y = torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0])
        >>> vectors = [SteeringVector({1: v}, "tiny", "demo", 8) for v in (x, y)]
        >>> [round(e.to_first.value, 3) for e in vector_entries(vectors)]
        [1.0, 0.6]
    """
    nulls = {"draws": draws, "seed": seed}
    for index, vector in enumerate(vectors):
        student = found[index] if found else None
        for layer, v in sorted(vector.directions.items()):
            first = vectors[0].directions.get(layer)
            previous = vectors[index - 1].directions.get(layer) if index else None
            entry = VectorEntry(
                index,
                layer,
                float(v.norm()),
                _cosine(v, first, layer, student, nulls),
                _cosine(v, previous, layer, student, nulls),
            )
            if student:
                shift = student.shift(layer)
                entry = replace(
                    entry,
                    relative_norm=entry.norm / float(student.neutral[layer].norm(dim=1).mean()),
                    shift_norm=float(shift.norm()),
                    to_shift=_cosine(v, shift, layer, student, nulls),
                )
            yield entry


def _cosine(
    v: Direction,
    other: Direction | None,
    layer: int,
    student: Student | None,
    nulls: dict[str, int],
) -> Cosine | None:
    if other is None or not bool(other.any()) or not bool(v.any()):
        return None
    value = float(torch.cosine_similarity(v.cpu(), other.cpu(), dim=0))
    if student is None:
        return Cosine(value)
    # Each persona's own mean goes, so that the trait is not part of what varies.
    sides = (student.positive[layer], student.negative[layer])
    states = torch.cat([side - side.mean(0) for side in sides])
    return Cosine(
        value,
        bound(random_cosines(other, states, **nulls)),
        bound(shuffled_cosines(other, student.differences(layer), **nulls)),
    )
