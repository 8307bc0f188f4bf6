"""Load the stages of a record back into what `shl.love` produced, bit for bit."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from experiments.record.journal import Line
from experiments.record.reader import Event, RecordReader, samples
from shl.config import LoopConfig
from shl.hooks.adapter import Adapter
from shl.hooks.vector import SteeringVector
from shl.measure.retention import Retention
from shl.measure.vignettes import reading
from shl.method.dose import Walk, ladder
from shl.method.filters import Verdict
from shl.method.heal import Healed, HealStep, Training
from shl.method.stages import InstrumentReading, Judged, Observer, Stage
from shl.models.generate import Completion
from shl.models.tokens import Prompt, encode
from shl.utils.errors import require
from shl.utils.model import Model

Made = TypeVar("Made", SteeringVector, Adapter)


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
        return Completion(prompt, t["text"], tuple(t["tokens"]), ids, t["dose"], t["ended"])


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
