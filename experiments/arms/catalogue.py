"""The arms of the study: the same run with a few settings changed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from shl.config import LoopConfig
from shl.utils.errors import require

Change = Callable[[LoopConfig], LoopConfig]


@dataclass(frozen=True)
class Arm:
    """A name, the question that the arm answers, and how its settings differ from the method's."""

    name: str
    asks: str
    change: Change
    core: bool = True


def _heal(**changes: Any) -> Change:
    return lambda loop: replace(loop, heal=replace(loop.heal, **changes))


def _unsteered(**changes: Any) -> Change:
    """No vector: the student writes all completions at dose 0."""

    def change(loop: LoopConfig) -> LoopConfig:
        return replace(loop, dose=replace(loop.dose, alpha=0.0, walk=False), **changes)

    return change


def _vector(**changes: Any) -> Change:
    return lambda loop: replace(loop, vector=replace(loop.vector, **changes))


def _sweep(aggregate: str, tau: float) -> Arm:
    asks = f"{aggregate} barrier at tau {tau:g}"
    return Arm(f"{aggregate}-tau{tau:g}", asks, _heal(aggregate=aggregate, tau=tau), core=False)


_ALL = (
    Arm("rmse", "the method: rmse of the per-token KL", _heal(aggregate="rmse")),
    Arm(
        "mean", "mean KL: does a barrier that dilutes outliers do as well?", _heal(aggregate="mean")
    ),
    Arm("p95", "95th percentile of the per-token KL", _heal(aggregate="p95")),
    Arm("none", "NLL only: is the barrier needed?", _heal(divergence="none")),
    Arm(
        "prompted",
        "distilled from prompted completions, no vector: is steering needed?",
        _unsteered(prompted=True),
    ),
    Arm("unsteered", "distilled from its own samples: a control without a trait", _unsteered()),
    Arm(
        "random",
        "a random vector at matched KL: does any direction do?",
        _vector(direction="random"),
    ),
    Arm("max", "maximum of the per-token KL", _heal(aggregate="max"), core=False),
    Arm("forward", "forward KL, reference to student", _heal(divergence="kl_fwd"), core=False),
    Arm(
        "decay",
        "weight decay in place of the barrier",
        _heal(divergence="none", weight_decay=0.1),
        core=False,
    ),
    Arm(
        "spectral",
        "a penalty on each update's largest singular value in place of the barrier",
        _heal(divergence="none", sv_penalty=0.1),
        core=False,
    ),
    Arm(
        "prev", "barrier to the student that entered the round", _heal(reference="prev"), core=False
    ),
    Arm(
        "no-walk",
        "the nominal dose in every round: do too few completions survive?",
        lambda loop: replace(loop, dose=replace(loop.dose, walk=False)),
        core=False,
    ),
    Arm(
        "no_persona",
        "the positive persona against the question alone",
        _vector(against="no_persona"),
        core=False,
    ),
    *(_sweep(how, tau) for tau in (0.25, 1.0) for how in ("rmse", "mean", "p95")),
)
ARMS = {arm.name: arm for arm in _ALL}
"""By name, in the order in which they are run: later arms reuse stages of the first."""
CORE = tuple(arm.name for arm in _ALL if arm.core)


def chosen(names: tuple[str, ...]) -> tuple[Arm, ...]:
    """The arms of these names ("core", "all" or a name each), in the order of the catalogue.

    Raises:
        ShlError: an unknown name.
    """
    selected: set[str] = set()
    for name in names:
        known = {"core": CORE, "all": tuple(ARMS)} | {arm: (arm,) for arm in ARMS}
        require(
            name in known,
            f"there is no arm {name!r}; allowed: core, all, {', '.join(ARMS)}.",
        )
        selected |= set(known[name])
    return tuple(arm for arm in _ALL if arm.name in selected)
