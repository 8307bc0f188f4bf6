"""From a run's record back to what `shl.love` was given, bit for bit."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformer_lens import HookedTransformer

from experiments.record.journal import Line
from experiments.record.reader import Lines
from shl.config import LoopConfig
from shl.hooks.adapter import Adapter
from shl.hooks.vector import SteeringVector
from shl.measure.vignettes import reading
from shl.method.dose import Walk, ladder
from shl.method.filters import Verdict
from shl.method.heal import Healed, HealStep, Training
from shl.method.loop import Stage
from shl.models.generate import Completion
from shl.models.tokens import Prompt, encode
from shl.utils.errors import require


class Recall:
    """`shl.love`'s `recall`: the stages that a record holds.

    Raises (when called):
        ShlError: a tensor file is missing, damaged or changed.
    """

    def __init__(self, record: Lines, model: HookedTransformer, config: LoopConfig) -> None:
        self.record, self.model, self.config = record, model, config

    def __call__(self, event: str, index: int, part: str) -> Mapping[str, Any] | None:
        """The values that `observe` was given, or None."""
        record = self.record
        if event == "training":
            path = record.place(index, "training")
            return {"state": Training.load(path)} if path.exists() else None
        name = {"stage": part, "reading": part, "healed": "healing"}.get(event, event)
        line = record.find(name, index, int(part) if event == "batch" else None)
        if line is None:
            return None
        if event == "stage":
            return self._stage(line)
        if event == "reading":
            return {"instrument": line["instrument"], "stage": line["stage"], "reading": line}
        if event == "vector":
            return {"vector": SteeringVector.load(record.place(index, "vector"))}
        if event == "healed":
            # A process may have been killed before it took this away.
            record.place(index, "training").unlink(missing_ok=True)
            adapter = Adapter.load(record.place(index, "adapter"), self.model)
            steps = tuple(HealStep(**step) for step in line["steps"])
            return {"healing": Healed(adapter, steps, self.config.heal)}
        extra = {"batch": line["batch"]} if event == "batch" else {}
        return {
            "verdicts": self._verdicts(record.texts_of(line)),
            "walk": self._walk(line),
            **extra,
        }

    def _stage(self, line: Line) -> dict[str, Any]:
        record, index = self.record, line["round"]
        base = record.find("base", -1)
        assert base is not None
        evaluation = reading(line["style"], scores(line), scores(base))
        if line["stage"] == "base":
            record.base = evaluation
        if line["stage"] != "steered":
            own = self._verdicts(record.texts_of(line))
            return {"stage": Stage(line["stage"], evaluation, tuple(own))}
        found = [
            text
            for event in record.events
            if event["round"] == index and event["event"] in ("probe", "batch")
            for text in record.texts_of(event)
            if abs(text["dose"] - line["dose"]) < 1e-9
        ]
        stage = Stage("steered", evaluation, tuple(self._verdicts(found)))
        return {"stage": stage, "kappa": line["kappa"], "dose": line["dose"]}

    def _verdicts(self, texts: Sequence[Line]) -> list[Verdict]:
        return [
            Verdict(
                self._completion(t),
                tuple(t["reasons"]),
                float("inf") if t["perplexity"] is None else t["perplexity"],
                float("inf") if t["tail_perplexity"] is None else t["tail_perplexity"],
            )
            for t in texts
        ]

    def _completion(self, t: Line) -> Completion:
        prompt = Prompt(t["prompt"], t["persona"])
        ids = tuple(encode(self.model, prompt))
        require(
            all(token < self.model.cfg.d_vocab for token in t["tokens"]),
            f"a text of round {t['round']} has a token beyond the vocabulary's "
            f"{self.model.cfg.d_vocab}.",
        )
        return Completion(prompt, t["text"], tuple(t["tokens"]), ids, t["dose"], t["ended"])

    def _walk(self, line: Line) -> Walk:
        kappas = ladder(self.config.dose)
        require(
            [rung["kappa"] for rung in line["ladder"]] == list(kappas) and line["kappa"] in kappas,
            f"the ladder of {line['event']} in round {line['round']} is not that of the settings.",
        )
        counts = tuple((rung["kept"], rung["generated"]) for rung in line["ladder"])
        return Walk(self.config.dose, kappas, counts, kappas.index(line["kappa"]))


def scores(line: Line) -> np.ndarray:
    """A stage line's raw scores, `[item, asked, option]`, float64 as they were."""
    sizes = {len(option) for item in line["log_probs"] for option in item}
    require(
        len(sizes) == 1 and len({len(item) for item in line["log_probs"]}) == 1,
        f"the scores of {line['stage']} in round {line['round']} are no table.",
    )
    return np.array(line["log_probs"], dtype=np.float64)
