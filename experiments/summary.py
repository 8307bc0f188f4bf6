"""The table at the end of a run, from its events alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from shl.axes import Axis

Event = Mapping[str, Any]


def stages(events: Sequence[Event], name: str) -> list[Event]:
    """The stage events of one name, in order of the rounds."""
    return [e for e in events if e["event"] == "stage" and e["stage"] == name]


def of_round(events: Sequence[Event], name: str) -> list[Event]:
    """The last event of one name per round."""
    last = {e["round"]: e for e in events if e["event"] == name}
    return [last[k] for k in sorted(last)]


def on_axis(stage: Event, base: Event, axis: Axis) -> float:
    """Mean shift of the axis's foundations in the expected direction, nats."""
    shifts = [sign * (stage["nats"][f] - base["nats"][f]) for f, sign in axis.expected.items()]
    return sum(shifts) / len(shifts)
