"""The observers of a run: one loads finished stages, bit for bit as `shl.love` produced them, the
other writes those that are computed as well."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from experiments.record.journal import Line, finite
from experiments.record.progress import BASELINES, ROUND, StageProgress
from experiments.record.reader import Event, RecordReader, samples
from experiments.record.schema import name_of
from experiments.record.writer import (
    RecordWriter,
    healing_numbers,
    shift_numbers,
    stage_numbers,
    text_lines,
    walk_numbers,
)
from shl.config import LoopConfig
from shl.hooks.adapter import Adapter
from shl.hooks.vector import SteeringVector
from shl.measure.continuations import STATISTICS
from shl.measure.retention import Retention
from shl.measure.stats import bootstrap
from shl.measure.vignettes import reading
from shl.method.dose import Walk, ladder
from shl.method.filters import Verdict
from shl.method.heal import Healed, HealStep, Training
from shl.method.stages import InstrumentReading, Judged, Observer, Retained, Stage
from shl.models.generate import Completion
from shl.models.tokens import Prompt, encode
from shl.utils.errors import require
from shl.utils.model import Model

Made = TypeVar("Made", SteeringVector, Adapter)

SAVE_EVERY = 20.0
"""Seconds of training between two saved states, which is the most that a killed run repeats."""


class Resume(Observer):
    """Supplies the finished stages of a record; what is computed is not saved.

    Its methods raise `ShlError` where a tensor file is missing, damaged or modified.
    """

    def __init__(self, record: RecordReader, model: Model, config: LoopConfig) -> None:
        self.record, self.model, self.config = record, model, config

    def find(self, name: str, index: int, batch: int | None = None) -> Line | None:
        """The event of a finished stage, or None."""
        return self.record.find(name, index, batch)

    def load_stage(self, index: int, name: str) -> Stage | None:
        """Return a measured stage; the samples of a steered one are those of its dose."""
        line, base = self.find(name, index), self.record.find("base", -1)
        if line is None or base is None:
            return None
        evaluation = reading(line["style"], scores(line), scores(base))
        if name != "steered":
            return Stage(name, evaluation, self._verdicts(self.record.texts_of(line)))
        texts = samples(self.record.texts, line)
        return Stage(name, evaluation, self._verdicts(texts), line["kappa"], line["dose"])

    def load_reading(self, index: int, instrument: str, stage: str) -> InstrumentReading | None:
        """Return what an instrument read of a stage."""
        line = self.find(f"{instrument}:{stage}", index)
        return None if line is None else InstrumentReading(instrument, stage, line)

    def load_vector(self, index: int) -> SteeringVector | None:
        """Return the vector of a round."""
        line = self.find("vector", index)
        if line is None:
            return None
        path = self.record.path_of(index, "vector")
        return _as_recorded(SteeringVector.load(path, self.model), line, path)

    def load_probe(self, index: int) -> Judged | None:
        """Return the judged rows of the dose ladder."""
        return self._judged(self.find("probe", index))

    def load_batch(self, index: int, number: int) -> Judged | None:
        """Return a full batch at the chosen dose."""
        return self._judged(self.find("batch", index, number))

    def load_training(self, index: int) -> Training | None:
        """Return the state of an interrupted training."""
        path = self.record.path_of(index, "training")
        return Training.load(path) if path.exists() else None

    def load_healed(self, index: int) -> Healed | None:
        """Return the trained adapter of a round with its log."""
        line = self.find("healing", index)
        if line is None:
            return None
        path = self.record.path_of(index, "adapter")
        adapter = _as_recorded(Adapter.load(path, self.model), line, path)
        return Healed(adapter, tuple(HealStep(**step) for step in line["steps"]), self.config.heal)

    def load_retention(self, index: int) -> dict[str, Retention] | None:
        """Return what a round's student has of the teacher's shift."""
        line = self.find("retention", index)
        if line is None:
            return None
        sums = ("teacher", "both", "student")
        return {
            name: Retention(*(tuple(found[key]) for key in sums))
            for name, found in line["sources"].items()
        }

    def _judged(self, line: Line | None) -> Judged | None:
        if line is None:
            return None
        kappas = ladder(self.config.dose)
        require(
            [rung["kappa"] for rung in line["ladder"]] == list(kappas) and line["kappa"] in kappas,
            f"the ladder of {line['event']} in round {line['round']} is not that of the settings.",
        )
        counts = tuple((rung["kept"], rung["generated"]) for rung in line["ladder"])
        walk = Walk(self.config.dose, kappas, counts, kappas.index(line["kappa"]))
        return Judged(self._verdicts(self.record.texts_of(line)), walk)

    def _verdicts(self, texts: Sequence[Event]) -> tuple[Verdict, ...]:
        def perplexity(value: float | None) -> float:
            return math.inf if value is None else value

        return tuple(
            Verdict(
                self._completion(t),
                tuple(t["reasons"]),
                perplexity(t["perplexity"]),
                perplexity(t["tail_perplexity"]),
                t.get("topic"),
            )
            for t in texts
        )

    def _completion(self, t: Event) -> Completion:
        prompt = Prompt(t["prompt"], t["persona"])
        ids = tuple(encode(self.model, prompt))
        require(
            all(token < self.model.cfg.d_vocab for token in t["tokens"]),
            f"a text of round {t['round']} has a token beyond the vocabulary's "
            f"{self.model.cfg.d_vocab}.",
        )
        return Completion(
            prompt,
            t["text"],
            tuple(t["tokens"]),
            ids,
            t["dose"],
            t["ended"],
            tuple(t.get("doses") or ()),
            tuple((int(kept), dose) for kept, dose in t.get("rewinds") or ()),
        )


def _as_recorded(found: Made, line: Line, path: Path) -> Made:
    """A vector or adapter, unless its norms differ from those in the event of its stage."""
    norms, recorded = ({str(k): v for k, v in x.items()} for x in (found.norms(), line["norms"]))
    require(
        norms.keys() == recorded.keys()
        and all(math.isclose(norms[k], recorded[k], rel_tol=1e-4) for k in norms),
        f"the norms of {path} differ from those on record: the file was replaced.",
    )
    return found


def scores(line: Event) -> np.ndarray:
    """Raw scores of a stage's line, `[item, paraphrase, option]`, float64 as they were."""
    sizes = {len(option) for item in line["log_probs"] for option in item}
    require(
        len(sizes) == 1 and len({len(item) for item in line["log_probs"]}) == 1,
        f"the scores of {line['stage']} in round {line['round']} differ in length.",
    )
    return np.array(line["log_probs"], dtype=np.float64)


SharedStages = Callable[[str, int], Iterable[RecordReader]]
"""From an event's name and round to the other runs in which that stage has the same result."""


class Reached(Exception):
    """The stage is finished after which the run was to stop."""


class Recorder(Resume):
    """The observer of a run: supplies what its record or a `shared` run holds, and writes what is
    computed.

    Before a stage that comes after `until`, a name in the baselines or the first round, it raises
    `Reached`.
    """

    record: RecordWriter

    def __init__(
        self,
        record: RecordWriter,
        model: Model,
        config: LoopConfig,
        progress: StageProgress,
        shared: SharedStages,
        until: str | None = None,
    ) -> None:
        super().__init__(record, model, config)
        self.progress, self.shared = progress, shared
        first = -1 if until in BASELINES else 0
        self._last = (config.rounds, 0) if until is None else _position(until, first)
        self._saved = time.monotonic()

    def find(self, name: str, index: int, batch: int | None = None) -> Line | None:
        """The event of a finished stage, copied from another run if need be, or None."""
        if _position(name, index) > self._last:
            raise Reached
        self.record.pause()
        line = self.recorded(name, index, batch)
        if line is not None:
            self.progress.finished(name, index, batch, loaded=True)
        return line

    def recorded(self, name: str, index: int, batch: int | None = None) -> Line | None:
        """The event of a name, copied from another run if need be, or None."""
        line = self.record.find(name, index, batch)
        if line is None:
            found = ((run.find(name, index, batch), run) for run in self.shared(name, index))
            line = next((self.record.copy(e, run) for e, run in found if e is not None), None)
        return line

    def save_stage(self, index: int, stage: Stage) -> None:
        """Write a measured stage and its samples; those of a steered one are written already."""
        line, base = self.record.find("base", -1), stage.evaluation
        if line is not None:
            base = reading(line["style"], scores(line), scores(line))
        numbers = stage_numbers(stage, self.config.eval)
        numbers |= shift_numbers(stage.evaluation, base, self.config.eval)
        if stage.name == "steered":
            self._finish("stage", index, numbers | {"kappa": stage.kappa, "dose": stage.dose})
        else:
            self._finish("stage", index, numbers, text_lines(stage.name, index, stage.samples))

    def save_reading(self, index: int, reading: InstrumentReading) -> None:
        """Write what an instrument read of a stage, and how that differs from base."""
        if "items" in reading.values:
            self._save_items(index, reading)
            return
        base = self.record.find(f"{reading.instrument}:base", -1) or reading.values
        shift = {key: nats - base["nats"][key] for key, nats in reading.values["nats"].items()}
        values = {"instrument": reading.instrument, "stage": reading.stage, **reading.values}
        self._finish("reading", index, values | {"shift": shift})

    def _save_items(self, index: int, reading: InstrumentReading) -> None:
        name, own = reading.instrument, reading.values["items"]
        base = self.record.find(f"{name}:base", -1) or reading.values
        pairs, of = np.stack([base["items"], own], 1), STATISTICS[name]
        settings = self.config.eval
        interval = bootstrap(
            pairs, of, resamples=settings.bootstrap, confidence=settings.confidence
        )
        values = {"instrument": name, "stage": reading.stage, "items": own}
        self._finish("items", index, values | {"value": of(pairs), "interval": list(interval)})

    def save_vector(self, index: int, vector: SteeringVector) -> None:
        """Write the vector of a round."""
        self.record.save(vector, index, "vector")
        self._finish("vector", index, {"norms": vector.norms(), "contexts": vector.contexts})

    def save_probe(self, index: int, probe: Judged) -> None:
        """Write the judged rows of the dose ladder."""
        texts = text_lines("probe", index, probe.verdicts)
        self._finish("probe", index, walk_numbers(probe.walk), texts)

    def save_batch(self, index: int, number: int, batch: Judged) -> None:
        """Write a full batch at the chosen dose."""
        texts = text_lines("batch", index, batch.verdicts, self.model)
        numbers = walk_numbers(batch.walk) | {"batch": number}
        if self.config.dose.backtrack:
            numbers["rewinds"] = sum(len(v.completion.rewinds) for v in batch.verdicts)
        self._finish("batch", index, numbers, texts)

    def on_step(
        self, index: int, step: HealStep, total: int, state: Callable[[], Training]
    ) -> None:
        """Write the state of training once in a while."""
        if time.monotonic() - self._saved >= SAVE_EVERY:
            self.record.save(state(), index, "training")
            self._saved = time.monotonic()
        self.progress.step(index, step.step, total, step.d)

    def save_healed(self, index: int, healed: Healed) -> None:
        """Write the trained adapter of a round with its log."""
        self.record.save(healed.adapter, index, "adapter")
        self._finish("healing", index, healing_numbers(healed))
        self.record.path_of(index, "training").unlink(missing_ok=True)

    def save_retention(self, index: int, retained: Retained) -> None:
        """Write what a round's student has of the teacher's shift."""
        sources = {
            name: {
                **{key: list(sums) for key, sums in vars(found).items()},
                "share": finite(found.share),
                "cosine": finite(found.cosine),
            }
            for name, found in retained.items()
        }
        self._finish("retention", index, {"sources": sources})

    def _finish(
        self, event: str, index: int, values: Mapping[str, Any], texts: Sequence[Line] = ()
    ) -> None:
        line = self.record.event(event, index, values, texts)
        self.progress.finished(name_of(line), index, line.get("batch"), loaded=False)


def _position(name: str, index: int) -> tuple[int, int]:
    """Where a stage, or a reading of it, stands in the order of a run."""
    order = BASELINES if index < 0 else ROUND
    return index, order.index(name.rsplit(":", 1)[-1])
