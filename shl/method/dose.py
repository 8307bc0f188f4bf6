"""The dose controller: from counts of surviving completions to the next kappa, without a model.

Probes at every rung of a ladder of doses give one survival share per rung, and the walk starts at
the highest rung whose share reaches the target. Later batches at that dose are added to its counts,
and the walk steps down when the share falls short.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from shl.config import DoseConfig
from shl.utils.errors import require


def ladder(config: DoseConfig) -> tuple[float, ...]:
    """The kappas that are probed, from 1 down to kappa_min, evenly spaced in log kappa.

    Example:
        >>> [round(k, 3) for k in ladder(DoseConfig(rungs=3, kappa_min=0.25))]
        [1.0, 0.5, 0.25]
    """
    if not config.walk or config.rungs == 1:
        return (1.0,)
    return tuple(config.kappa_min ** (i / (config.rungs - 1)) for i in range(config.rungs))


@dataclass(frozen=True)
class Walk:
    """State of the search: the ladder, counts per rung, and the rung in use.

    Example:
        >>> walk = start(DoseConfig(rungs=3, kappa_min=0.25, target_survival=0.5))
        >>> walk = settle(walk, {1.0: (1, 8), 0.5: (5, 8), 0.25: (8, 8)})
        >>> walk.kappa
        0.5
    """

    config: DoseConfig
    kappas: tuple[float, ...]
    counts: tuple[tuple[int, int], ...]  # (kept, generated) per rung
    rung: int = 0

    @property
    def kappa(self) -> float:
        """The dose multiplier in use."""
        return self.kappas[self.rung]

    @property
    def dose(self) -> float:
        """The dose in use [multiples of the raw vector]."""
        return self.kappa * self.config.alpha

    @property
    def at_floor(self) -> bool:
        """Whether there is no lower dose to step down to."""
        return self.rung == len(self.kappas) - 1

    def survival(self, rung: int) -> float | None:
        """Share kept so far at a rung, or None before anything was generated there."""
        kept, generated = self.counts[rung]
        return kept / generated if generated else None

    def counted(self, rung: int, kept: int, generated: int) -> "Walk":
        """The walk with more completions counted at a rung."""
        counts = list(self.counts)
        counts[rung] = (counts[rung][0] + kept, counts[rung][1] + generated)
        return replace(self, counts=tuple(counts))


def start(config: DoseConfig) -> Walk:
    """A walk at the top of its ladder with nothing counted."""
    kappas = ladder(config)
    return Walk(config, kappas, ((0, 0),) * len(kappas))


def settle(walk: Walk, probes: Mapping[float, tuple[int, int]]) -> Walk:
    """Count (kept, generated) per kappa, and move to the highest rung at the target share.

    If no probed rung reaches the target, the one with the best survival is used, the lowest dose
    of equals.

    Raises:
        ShlError: a kappa is not on the ladder, or more completions are kept than generated.
    """
    for kappa, (kept, generated) in probes.items():
        require(kappa in walk.kappas, f"kappa {kappa} is not on the ladder {walk.kappas}.")
        require(
            0 <= kept <= generated,
            f"{kept} kept of {generated} generated at kappa {kappa}, kept must be at least 0 and "
            "at most generated.",
        )
        walk = walk.counted(walk.kappas.index(kappa), kept, generated)
    shares = {i: s for i in range(len(walk.kappas)) if (s := walk.survival(i)) is not None}
    if not shares:
        return walk
    good = [i for i, share in shares.items() if share >= walk.config.target_survival]
    return replace(walk, rung=min(good) if good else max(shares, key=lambda i: (shares[i], i)))


def after_batch(walk: Walk, kept: int, generated: int) -> Walk:
    """Count a full batch at the rung in use; step down one rung if that rung's pooled survival
    has fallen below the target by more than two standard errors of a share.

    Example:
        >>> walk = start(DoseConfig(rungs=3, kappa_min=0.25, target_survival=0.75))
        >>> after_batch(walk, 4, 32).kappa, after_batch(walk, 22, 32).kappa
        (0.5, 1.0)
    """
    walk = walk.counted(walk.rung, kept, generated)
    total_kept, total = walk.counts[walk.rung]
    target = walk.config.target_survival
    slack = 2 * (target * (1 - target) / total) ** 0.5
    down = walk.config.walk and not walk.at_floor and total_kept / total < target - slack
    return replace(walk, rung=walk.rung + down)
