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
    question: str
    change: Change


def _set(stage: str, **changes: Any) -> Change:
    return lambda loop: replace(loop, **{stage: replace(getattr(loop, stage), **changes)})


def _unsteered(**changes: Any) -> Change:
    """No vector: the student writes all completions at dose 0."""
    return lambda loop: replace(_set("dose", alpha=0.0, walk=False)(loop), **changes)


def _sweep(aggregate: str, tau: float) -> Arm:
    change = _set("heal", aggregate=aggregate, tau=tau)
    return Arm(f"{aggregate}-tau{tau:g}", f"{aggregate} barrier at tau {tau:g}", change)


_CORE = (
    Arm("rmse", "the method: rmse of the per-token KL", _set("heal", aggregate="rmse")),
    Arm(
        "mean",
        "mean KL: does a barrier that dilutes outliers do as well?",
        _set("heal", aggregate="mean"),
    ),
    Arm("p95", "95th percentile of the per-token KL", _set("heal", aggregate="p95")),
    Arm("none", "NLL only: is the barrier needed?", _set("heal", divergence="none")),
    Arm(
        "prompted",
        "distilled from prompted completions, no vector: is steering needed?",
        _unsteered(prompted=True),
    ),
    Arm("unsteered", "distilled from its own samples: a control without a trait", _unsteered()),
    Arm(
        "random",
        "a random vector at matched KL: does any direction do?",
        _set("vector", direction="random"),
    ),
)
_OTHERS = (
    Arm("max", "maximum of the per-token KL", _set("heal", aggregate="max")),
    Arm("forward", "forward KL, reference to student", _set("heal", divergence="kl_fwd")),
    Arm(
        "decay",
        "weight decay in place of the barrier",
        _set("heal", divergence="none", weight_decay=0.1),
    ),
    Arm(
        "spectral",
        "a penalty on each update's largest singular value in place of the barrier",
        _set("heal", divergence="none", sv_penalty=0.1),
    ),
    Arm("prev", "barrier to the student that entered the round", _set("heal", reference="prev")),
    Arm(
        "no-walk",
        "the nominal dose in every round: do too few completions survive?",
        _set("dose", walk=False),
    ),
    Arm(
        "no_persona",
        "the positive persona against the question alone",
        _set("vector", against="no_persona"),
    ),
    *(_sweep(how, tau) for tau in (0.25, 1.0) for how in ("rmse", "mean", "p95")),
)
ARMS = {arm.name: arm for arm in (*_CORE, *_OTHERS)}
"""By name, in the order in which they are run: later arms reuse stages of the first."""
CORE = tuple(arm.name for arm in _CORE)


def chosen(names: tuple[str, ...]) -> tuple[Arm, ...]:
    """The arms of these names ("core", "all" or a name each), in the order of the catalogue.

    Raises:
        ShlError: an unknown name.
    """
    known = {"core": CORE, "all": tuple(ARMS)} | {name: (name,) for name in ARMS}
    for name in names:
        allowed = f"core, all, {', '.join(ARMS)}"
        require(name in known, f"there is no arm {name!r}; allowed: {allowed}.")
    selected = {arm for name in names for arm in known[name]}
    return tuple(arm for name, arm in ARMS.items() if name in selected)
