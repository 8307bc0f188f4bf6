"""Where a number goes on an axis, and which numbers are written beside it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shl.utils.errors import require

LARGEST = 1e12
"""What an axis can hold; more is a number gone wrong, and its span would overflow."""


@dataclass(frozen=True)
class AxisSpec:
    """An axis: its label with the unit, linear or logarithmic.

    `low` and `high` are shown in any case, `ticks` (value to text) replace the numbers, `across`
    turns categories' names into the ticks of a vertical axis with room for words.
    """

    label: str
    log: bool = False
    low: float | None = None
    high: float | None = None
    ticks: Mapping[float, str] | None = None


class Scale:
    """Numbers to coordinates between `start` and `stop`.

    Raises:
        ShlError: a number that is not finite or beyond `LARGEST`, or not above 0 on a log axis.

    Example:
        >>> Scale(AxisSpec("nats", log=True), [0.1, 10.0], 0, 100)(1.0)
        50.0
    """

    def __init__(
        self, spec: AxisSpec, values: Sequence[float], start: float, stop: float, pad: float = 0.0
    ) -> None:
        shown = [*values, *(v for v in (spec.low, spec.high) if v is not None), *(spec.ticks or ())]
        require(bool(shown), f"the axis {spec.label!r} has no number to show.")
        for value in shown:
            require(
                math.isfinite(value) and abs(value) <= LARGEST and (value > 0 or not spec.log),
                f"{value:g} cannot be drawn on the {'log ' if spec.log else ''}axis "
                f"{spec.label!r}.",
            )
        self.spec, self.start, self.stop = spec, start, stop
        low, high = self._inner(min(shown)), self._inner(max(shown))
        if high - low < 1e-12 * max(1.0, abs(low)):
            low, high = low - 0.5, high + 0.5
        room = pad * (high - low)
        ends = [self._inner(v) if v is not None else None for v in (spec.low, spec.high)]
        self.low = low if ends[0] == low else low - room
        self.high = high if ends[1] == high else high + room

    def _inner(self, value: float) -> float:
        return math.log10(value) if self.spec.log else value

    def __call__(self, value: float) -> float:
        """The coordinate of a number."""
        share = (self._inner(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self, count: int = 5) -> list[tuple[float, str]]:
        """Numbers on the axis with their texts."""
        if self.spec.ticks is not None:
            return list(self.spec.ticks.items())
        found = self._log_ticks(count) if self.spec.log else self._linear_ticks(count)
        return [(value, _text(value)) for value in found]

    def _linear_ticks(self, count: int) -> list[float]:
        rough = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]

    def _log_ticks(self, count: int) -> list[float]:
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        skip = max(1, math.ceil(len(decades) / (count + 1)))
        for within in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
            found = [m * 10.0**d for d in decades[::skip] for m in within]
            inside = [v for v in found if self.low - 1e-9 <= math.log10(v) <= self.high + 1e-9]
            if len(inside) >= 3:
                return inside
        return self._narrow()

    def _narrow(self) -> list[float]:
        """A log axis over less than a third of a decade, marked like a linear one."""
        linear = AxisSpec(self.spec.label)
        ends = [10.0**self.low, 10.0**self.high]
        return [v for v in Scale(linear, ends, 0, 1)._linear_ticks(4) if v > 0]


def _text(value: float) -> str:
    text = f"{value:.6g}" if value else "0"
    return text.replace("e+0", "e").replace("e-0", "e-").replace("-", "\u2212")
