"""The report's completions token by token, shaded by their divergence."""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from experiments.summary import Event, of_round
from shl.kl import aggregate

HEAT = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Edges between the shades of a token's divergence [nats]."""


@dataclass(frozen=True)
class Heat:
    """A completion token by token: text, divergence, shade (0 to 7), whether above tau."""

    verdict: str
    prompt: str | None
    reasons: tuple[str, ...]
    dose: float
    tokens: tuple[tuple[str, float, int, bool], ...]
    sizes: Mapping[str, float]
    over: int


def heat(curve: Mapping[str, Any], tau: float) -> Heat:
    """One completion of a token_kl event.

    Example:
        >>> seen = heat(
        ...     {"verdict": "kept", "reasons": [], "dose": 1.0, "pieces": ["a", "b"],
        ...      "kl": [0.0, 4.0]}, 0.5)
        >>> seen.tokens, seen.sizes["mean"], seen.over
        ((('a', 0.0, 0, False), ('b', 4.0, 6, True)), 2.0, 1)
    """
    kl = curve["kl"]
    tokens = tuple(
        (piece, value, bisect.bisect_right(HEAT, value), value > tau)
        for piece, value in zip(curve["pieces"], kl, strict=True)
    )
    return Heat(
        curve["verdict"],
        curve.get("prompt"),
        tuple(curve["reasons"]),
        curve["dose"],
        tokens,
        sizes(kl),
        sum(token[3] for token in tokens),
    )


def sizes(kl: Sequence[float]) -> dict[str, float]:
    """The aggregates of a completion's divergences: mean, rmse, p95 (linearly interpolated), max.

    Example:
        >>> {name: round(v, 2) for name, v in sizes([0.0] * 56 + [3.8, 4.2, 6.7, 8.1]).items()}
        {'mean': 0.38, 'rmse': 1.54, 'p95': 3.82, 'max': 8.1}
    """
    tokens = torch.tensor(kl, dtype=torch.float64)
    return {how: float(aggregate(tokens, how)) for how in ("mean", "rmse", "p95", "max")}


def heats(events: Sequence[Event], tau: float) -> list[tuple[int, list[Heat]]]:
    """Every round's completions."""
    return [
        (e["round"], [heat(curve, tau) for curve in e["curves"]])
        for e in of_round(events, "token_kl")
    ]
