"""What a round hands over, and how a caller follows it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformer_lens import HookedTransformer

from shl.dose import Walk
from shl.errors import ShlError
from shl.filters import Verdict
from shl.generate import Completion
from shl.heal import Healed
from shl.lora import Adapter
from shl.stages import Stage
from shl.vector import SteeringVector

Observer = Callable[[str, int, Mapping[str, Any]], None]
"""Called as `observe(event, round, values)` after a stage; round is -1 before the first."""
Recall = Callable[[str, int, str], Mapping[str, Any] | None]
"""Called as `recall(event, round, part)` before a stage; the values that `observe` was given when
an earlier process finished it, or None. `part` is the stage's name or the batch's number. For the
event "training" it is the `Training` of a healing that was cut off, under "state"; that of a
"reading" is "NAME:STAGE"."""
Instrument = Callable[[HookedTransformer, str | None], Mapping[str, Any]]
"""Called with the model as it stands, hooks included, and the persona's text or None; what it
returns is observed as the event "reading"."""


class StarvedError(ShlError):
    """Too few completions survived the filter to train on."""


@dataclass(frozen=True)
class Round:
    """Everything that one round made and measured.

    `probes` are the judged rows of the dose ladder, `dreams` those of the full batches at
    `kappa`; `kept` is what the adapter was trained on.

    Example:
        >>> list(Round.__dataclass_fields__)[:5]
        ['index', 'vector', 'walk', 'kappa', 'dose']
    """

    index: int
    vector: SteeringVector
    walk: Walk
    kappa: float
    dose: float
    probes: tuple[Verdict, ...]
    dreams: tuple[Verdict, ...]
    kept: tuple[Completion, ...]
    healing: Healed
    steered: Stage
    healed: Stage

    @property
    def adapter(self) -> Adapter:
        """The round's frozen adapter."""
        return self.healing.adapter
