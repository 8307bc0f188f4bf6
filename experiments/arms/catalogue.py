"""The arms of the study: the same run with a few settings changed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from shl.config import METHOD, HealConfig, LoopConfig
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


_FAR = 1.5
"""A dose at which steering alone is incoherent [multiples of the vector]."""


def _far(**changes: Any) -> Change:
    """Trained on what passes the filter at that dose, with its teacher."""
    dose = _set("dose", walk=False, alpha=_FAR, max_batches=8)
    return lambda loop: _set("heal", **changes)(dose(loop))


_SAMPLED = HealConfig(tau=METHOD.tau)
"""Training on sampled tokens, with the method's barrier."""
_SOFT = replace(_SAMPLED, target="soft")
_REGISTERS = replace(_SOFT, unsteered=METHOD.unsteered, narrative=METHOD.narrative)
_POSITIONS = replace(_REGISTERS, positions="all")

_CORE = (
    Arm("rmse", "the method: rmse of the per-token KL", _set("heal", aggregate="rmse")),
    Arm(
        "prompted",
        "distilled from the prompted persona, no vector: is steering needed?",
        _unsteered(prompted=True),
    ),
    Arm(
        "both",
        "the teacher is steered and has the persona in its prompt",
        lambda loop: replace(loop, prompted=True),
    ),
    Arm("none", "no barrier: is it needed?", _set("heal", divergence="none")),
    Arm(
        "mean",
        "mean KL: does a barrier that dilutes outliers do as well?",
        _set("heal", aggregate="mean"),
    ),
    Arm("p95", "95th percentile of the per-token KL", _set("heal", aggregate="p95")),
    Arm(
        "random",
        "a random vector at matched KL: does any direction do?",
        _set("vector", direction="random"),
    ),
    Arm("unsteered", "distilled from its own samples: a control without a trait", _unsteered()),
)
_STEPS = (
    Arm("sampled", "NLL of the sampled tokens", lambda loop: replace(loop, heal=_SAMPLED)),
    Arm("soft", "soft targets on the same texts", lambda loop: replace(loop, heal=_SOFT)),
    Arm(
        "registers",
        "and on unsteered answers and running text",
        lambda loop: replace(loop, heal=_REGISTERS),
    ),
    Arm("positions", "and at all positions", lambda loop: replace(loop, heal=_POSITIONS)),
    Arm(
        "clip",
        "and the teacher clipped at 1 nat per token",
        lambda loop: replace(loop, heal=replace(_POSITIONS, clip=1.0)),
    ),
    Arm(
        "lr",
        "not clipped, one pass at the method's rate",
        lambda loop: replace(loop, heal=replace(_POSITIONS, epochs=METHOD.epochs, lr=METHOD.lr)),
    ),
    Arm("odd", "the method with the odd target", _set("heal", odd=True)),
)
"""From sampled targets to the method, one change at a time; compared after one round."""
_FAR_ARMS = (
    Arm("far-none", f"trained from dose {_FAR:g} without a barrier", _far(divergence="none")),
    *(
        Arm(f"far-{how}", f"trained from dose {_FAR:g} with {how} of the KL", _far(aggregate=how))
        for how in ("mean", "rmse", "p95")
    ),
)


def _online(**changes: Any) -> Change:
    return lambda loop: replace(_set("online", **changes)(loop), mode="online")


# Steps that take about the CPU time of a round of the method; their own is in the table.
_ONLINE = (
    Arm(
        "online",
        "on-policy: KL to the steered student on the student's own texts",
        _online(objective="teacher"),
    ),
    Arm(
        "online-reward",
        "on-policy: policy gradient of trait, coherence and filter",
        _online(objective="reward", every=4),
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
        f"dose {_FAR:g} in every round: do too few completions survive?",
        _set("dose", walk=False, alpha=_FAR),
    ),
    Arm(
        "no_persona",
        "the positive persona against the question alone",
        _set("vector", against="no_persona"),
    ),
    *(_sweep(how, tau) for tau in (0.25, 2.0) for how in ("rmse", "mean", "p95")),
)
ARMS = {arm.name: arm for arm in (*_CORE, *_STEPS, *_FAR_ARMS, *_ONLINE, *_OTHERS)}
"""By name, in the order in which they are run: later arms reuse stages of the first."""
GROUPS = {
    "core": tuple(arm.name for arm in _CORE),
    "steps": tuple(arm.name for arm in (*_STEPS, _CORE[0])),
    "far": tuple(arm.name for arm in _FAR_ARMS),
    "on-policy": tuple(arm.name for arm in (_CORE[0], *_ONLINE)),
    "all": tuple(ARMS),
}
"""Arms that are run and compared together."""


def chosen(names: tuple[str, ...]) -> tuple[Arm, ...]:
    """The arms of these names (those of `GROUPS`, or of an arm), in the order of the catalogue.

    Raises:
        ShlError: an unknown name.
    """
    known = GROUPS | {name: (name,) for name in ARMS}
    for name in names:
        allowed = ", ".join(known)
        require(name in known, f"there is no arm {name!r}; allowed: {allowed}.")
    selected = {arm for name in names for arm in known[name]}
    return tuple(arm for name, arm in ARMS.items() if name in selected)
