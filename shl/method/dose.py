"""The dose controller: survival in, next kappa out. It does not use the model.

A ladder of doses is probed as rows of one batch, pooled into one survival estimate per rung,
and the highest rung that survives at the target share is used. Each later batch at that dose
reports its own survival, and the controller steps down the ladder when it falls short.
"""

from collections.abc import Mapping
from dataclasses import dataclass

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
    """Where the walk stands: the ladder, counts per rung, and the rung in use.

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
    def at_floor(self) -> bool:
        """Whether there is no lower dose to step down to."""
        return self.rung == len(self.kappas) - 1

    def survival(self, rung: int) -> float | None:
        """Share kept so far at a rung, or None before anything was generated there."""
        kept, generated = self.counts[rung]
        return kept / generated if generated else None


def start(config: DoseConfig) -> Walk:
    """A walk at the top of its ladder with nothing counted."""
    kappas = ladder(config)
    return Walk(config, kappas, tuple((0, 0) for _ in kappas))


def settle(walk: Walk, probes: Mapping[float, tuple[int, int]]) -> Walk:
    """Count (kept, generated) per kappa, and move to the highest rung at the target share.

    Where no probed rung reaches the target, the one with the best survival is taken, the lower
    of equals: a walk never stays where the text is known to be worse than elsewhere.

    Raises:
        ShlError: a kappa off the ladder, or counts that cannot be.
    """
    counts = list(walk.counts)
    for kappa, (kept, generated) in probes.items():
        require(kappa in walk.kappas, f"kappa {kappa} is not on the ladder {walk.kappas}.")
        require(
            0 <= kept <= generated,
            f"{kept} kept of {generated} generated at kappa {kappa} cannot be.",
        )
        rung = walk.kappas.index(kappa)
        counts[rung] = (counts[rung][0] + kept, counts[rung][1] + generated)
    walk = Walk(walk.config, walk.kappas, tuple(counts), walk.rung)
    shares = {i: s for i in range(len(counts)) if (s := walk.survival(i)) is not None}
    if not shares:
        return walk
    good = [i for i, share in shares.items() if share >= walk.config.target_survival]
    rung = min(good) if good else max(shares, key=lambda i: (shares[i], i))
    return Walk(walk.config, walk.kappas, walk.counts, rung)


def after_batch(walk: Walk, kept: int, generated: int) -> Walk:
    """Count a full batch at the rung in use; step down one rung if that rung's pooled survival
    has fallen below the target by more than two standard errors of a share.

    Example:
        >>> walk = start(DoseConfig(rungs=3, kappa_min=0.25, target_survival=0.75))
        >>> after_batch(walk, 4, 32).kappa, after_batch(walk, 22, 32).kappa
        (0.5, 1.0)
    """
    counts = list(walk.counts)
    counts[walk.rung] = (counts[walk.rung][0] + kept, counts[walk.rung][1] + generated)
    total_kept, total = counts[walk.rung]
    target = walk.config.target_survival
    slack = 2 * (target * (1 - target) / total) ** 0.5
    starving = walk.config.walk and total_kept / total < target - slack
    rung = walk.rung + 1 if starving and not walk.at_floor else walk.rung
    return Walk(walk.config, walk.kappas, tuple(counts), rung)
