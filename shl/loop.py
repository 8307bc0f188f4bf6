"""`love`: steer, filter, heal, and again; yields a frozen `Round` at a time.

No files, no printing, no pictures: `observe` is told of every finished stage, so that a caller
can keep what has been computed; `recall` is asked before a stage is computed, so that a caller who
kept it need not compute it again. Random draws are functions of (seed, round, stage, item), so a
run that goes on from what it recalls ends with the same bits as one that was never cut off.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from transformer_lens import HookedTransformer

from shl.axes import Axis
from shl.config import LoopConfig
from shl.lora import Adapter
from shl.rounds import Instrument, Observer, Recall, Round, StarvedError
from shl.stages import Stage
from shl.study import Study
from shl.vignettes import remember_base

__all__ = ["Instrument", "Observer", "Recall", "Round", "StarvedError", "baselines", "love"]


_NONE: Mapping[str, Instrument] = MappingProxyType({})


def _silent(event: str, index: int, values: Mapping[str, Any]) -> None:
    """The default observer."""


def _forgetful(event: str, index: int, part: str) -> None:
    """The default recall: every stage is computed."""


def baselines(
    model: HookedTransformer,
    axis: Axis,
    config: LoopConfig | None = None,
    observe: Observer = _silent,
    recall: Recall = _forgetful,
    *,
    instruments: Mapping[str, Instrument] = _NONE,
) -> dict[str, Stage]:
    """Base and both prompted personas, measured like every later stage, without training.

    Args:
        instruments: by name, what else reads each stage (see `love`).

    Returns:
        `base`, `prompted+` and `prompted-`.

    Raises:
        ShlError: a score that is not finite, or a prompt that leaves no room in the context.

    Example:
        >>> from shl.axes import load_axis
        >>> from shl.config import EvalConfig, GenerateConfig
        >>> from shl.tiny import tiny_gemma
        >>> config = LoopConfig(
        ...     generate=GenerateConfig(max_new_tokens=4), eval=EvalConfig(samples=1)
        ... )
        >>> stages = baselines(tiny_gemma(), load_axis("care_auth"), config)
        >>> stages["base"].coherence
        1.0
    """
    study = Study(model, axis, config or LoopConfig(), observe, recall, instruments)
    personas = {"base": None, "prompted+": axis.positive, "prompted-": axis.negative}
    stages = {}
    for name, persona in personas.items():
        stages[name] = study.stage(-1, name, persona=persona)
        if name == "base":
            remember_base(model, stages[name].evaluation)
    return stages


def love(
    model: HookedTransformer,
    axis: Axis,
    config: LoopConfig | None = None,
    *,
    observe: Observer = _silent,
    recall: Recall = _forgetful,
    instruments: Mapping[str, Instrument] = _NONE,
) -> Iterator[Round]:
    """Run the method round by round; hooks are off between rounds.

    Args:
        instruments: by name, what else reads each stage: called once per stage with the model,
            its hooks on, and the persona or None; `observe` is told as "reading".

    Raises:
        StarvedError: fewer than `min_train` survivors within the batch budget; the sentence says
            how many, at which dose, and which rules dropped the rest.
        ShlError: a setting that does not fit the model.
        NotFiniteError: NaN or infinity; the sentence names stage, round, site and step.

    Example:
        >>> from shl.axes import load_axis
        >>> from shl.tiny import tiny_gemma
        >>> rounds = love(tiny_gemma(), load_axis("care_auth"))  # nothing has run yet
    """
    config = config or LoopConfig()
    study = Study(model, axis, config, observe, recall, instruments)
    adapters: list[Adapter] = []
    for index in range(config.rounds):
        finished = study.round(index, tuple(adapters))
        adapters.append(finished.adapter)
        yield finished
