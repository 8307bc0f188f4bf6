"""Results of the loop's stages, and the observer that receives them.

measure    Stage              base, both prompted personas, and each round's two models
extract    SteeringVector
probe      Judged             the dose ladder
generate   Judged             one per batch at the chosen dose
heal       Healed             and a `Training` state after each optimiser step
retain     Retention          per source of texts, after healing
read       InstrumentReading  one per instrument and measured stage
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from shl.hooks.vector import SteeringVector
from shl.measure.evaluation import Evaluation
from shl.measure.retention import Retention
from shl.method.dose import Walk
from shl.method.filters import Verdict
from shl.method.heal import Healed, HealStep, Training
from shl.utils.errors import ShlError


class StarvedError(ShlError):
    """Too few completions survived the filter to train on."""


@dataclass(frozen=True)
class Stage:
    """One measured model: the vignettes, and free samples with their verdicts.

    `kappa` and `dose` are those of the steering, None without steering.
    """

    name: str
    evaluation: Evaluation
    samples: tuple[Verdict, ...]
    kappa: float | None = None
    dose: float | None = None

    @property
    def survival(self) -> float:
        """Share of the free samples that pass the filter."""
        return sum(v.kept for v in self.samples) / len(self.samples)

    @property
    def perplexity(self) -> float:
        """Median base perplexity of the free samples."""
        return float(np.median([v.perplexity for v in self.samples]))

    @property
    def nats(self) -> dict[str, float]:
        """Log mean probability per foundation."""
        return self.evaluation.nats

    @property
    def coherence(self) -> float:
        """Valid-answer mass relative to base."""
        return self.evaluation.coherence


@dataclass(frozen=True)
class Judged:
    """Judged completions, and the dose walk after they were counted."""

    verdicts: tuple[Verdict, ...]
    walk: Walk


@dataclass(frozen=True)
class InstrumentReading:
    """Values that an instrument returned for one measured stage, by its own names."""

    instrument: str
    stage: str
    values: Mapping[str, Any]


Retained = Mapping[str, Retention]
"""What a round's student has of the teacher's shift, by source of the texts."""


class Observer:
    """Receives the result of each stage, and may supply it instead.

    Before a stage, `love` and `baselines` call its `load` method. If that returns a result, the
    stage is not computed; if it returns None, the stage is computed and passed to its `save`
    method before the next stage. Here every method does nothing; a subclass overrides those it
    needs. `index` is the round, -1 for the baselines.

    Example:
        >>> class Print(Observer):
        ...     def save_stage(self, index: int, stage: Stage) -> None:
        ...         print(index, stage.name, stage.coherence)
    """

    def load_stage(self, index: int, name: str) -> Stage | None:
        """Return a measured stage: base, prompted+, prompted-, steered or healed."""

    def save_stage(self, index: int, stage: Stage) -> None:
        """Receive a measured stage."""

    def load_vector(self, index: int) -> SteeringVector | None:
        """Return the vector of a round."""

    def save_vector(self, index: int, vector: SteeringVector) -> None:
        """Receive the vector of a round."""

    def load_probe(self, index: int) -> Judged | None:
        """Return the judged rows of the dose ladder."""

    def save_probe(self, index: int, probe: Judged) -> None:
        """Receive the judged rows of the dose ladder."""

    def load_batch(self, index: int, number: int) -> Judged | None:
        """Return a full batch at the chosen dose."""

    def save_batch(self, index: int, number: int, batch: Judged) -> None:
        """Receive a full batch at the chosen dose."""

    def load_training(self, index: int) -> Training | None:
        """Return the state of an interrupted training, to continue it."""

    def on_step(
        self, index: int, step: HealStep, total: int, state: Callable[[], Training]
    ) -> None:
        """Receive each of `total` optimiser steps; `state()` copies the training state."""

    def load_healed(self, index: int) -> Healed | None:
        """Return the trained adapter of a round with its log."""

    def save_healed(self, index: int, healed: Healed) -> None:
        """Receive the trained adapter of a round with its log."""

    def load_retention(self, index: int) -> Retained | None:
        """Return what a round's student has of the teacher's shift."""

    def save_retention(self, index: int, retained: Retained) -> None:
        """Receive what a round's student has of the teacher's shift."""

    def load_reading(self, index: int, instrument: str, stage: str) -> InstrumentReading | None:
        """Return an instrument's values for a stage."""

    def save_reading(self, index: int, reading: InstrumentReading) -> None:
        """Receive an instrument's values for a stage."""
