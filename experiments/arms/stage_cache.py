"""What one arm has computed, another need not: the base passes, and the first round up to where
the settings part."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from transformer_lens import HookedTransformer

from experiments.record.reader import Past
from experiments.record.resume import Recall
from shl.config import HealConfig, LoopConfig

_LOOP = TypeAdapter(LoopConfig)


def alike(event: str, index: int, mine: LoopConfig, theirs: LoopConfig) -> bool:
    """Whether a stage of another run of the same model and axis is bit for bit that of mine.

    Before the first round nothing but sampling, filter and eval has been used; in the first round
    everything but training. Later rounds rest on an adapter.
    """
    if event == "stage" and index < 0:
        own = [(c.seed, c.generate, c.filter, c.eval) for c in (mine, theirs)]
        return own[0] == own[1]
    if index != 0 or event not in ("vector", "probe", "batch", "stage"):
        return False
    if event == "vector" and mine.vector == theirs.vector and mine.vector.direction == "contrast":
        return True
    # The lam schedule and the training are what may differ; both come after these stages.
    bare = [replace(c, heal=HealConfig(), rounds=1) for c in (mine, theirs)]
    return bare[0] == bare[1]


class Lender:
    """A `lent` of `experiments.run.study`: looks through runs of the same model and axis.

    Args:
        folders: finished or unfinished runs that nobody is writing to.
    """

    def __init__(
        self, folders: Sequence[Path], model: HookedTransformer, config: LoopConfig
    ) -> None:
        self.config = config
        self.past = [(past, Recall(past, model, config)) for past in map(Past, folders)]

    def __call__(self, event: str, index: int, part: str) -> Mapping[str, Any] | None:
        """The values of a stage that another run has finished alike, or None."""
        if event in ("training", "healed") or (event == "stage" and part == "healed"):
            return None
        for past, recall in self.past:
            if alike(event, index, self.config, _loop(past.settings)):
                values = recall(event, index, part)
                if values is not None:
                    return values
        return None


def _loop(settings: Mapping[str, Any]) -> LoopConfig:
    return _LOOP.validate_python(settings["loop"])
