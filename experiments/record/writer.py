"""The run folder: what is run, one line per finished stage, vectors and adapters.

    config.json      the settings, as asked for
    axis.json        the axis, as read
    versions.json    python, packages, code, commit, device, threads
    events.jsonl     one line per finished stage; a stage counts once its line is whole
    texts.jsonl      one line per completion, with every reason to drop it
    rounds/N/        vector.safetensors, adapter.safetensors (training.safetensors meanwhile)
    processes.jsonl  when each process began and ended, and its peak memory

Plots and reports are made from these files alone. All but the last hold no times of day, so that
a run that was killed and went on leaves the same bits as one that was not (`seconds` apart).
"""

import dataclasses
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformer_lens import HookedTransformer

from experiments.record.journal import Journal, Line, Lock, failed, read_lines, write
from experiments.record.reader import FILES, Lines, check_files, digest, read_json, same
from experiments.record.schema import check_lines
from shl.config import FOUNDATIONS, EvalConfig
from shl.hooks.adapter import Adapter
from shl.hooks.bake import baked
from shl.hooks.vector import SteeringVector
from shl.measure.evaluation import Evaluation
from shl.method.dose import Walk
from shl.method.filters import Verdict
from shl.method.heal import Healed
from shl.method.loop import Round, Stage
from shl.models.generate import without_persona
from shl.models.scores import token_divergence
from shl.models.tokens import decode
from shl.utils.errors import require


def finite(value: float) -> float | None:
    """None for infinity (an empty completion's perplexity), which JSON cannot hold."""
    return value if math.isfinite(value) else None


def stage_numbers(stage: Stage, config: EvalConfig) -> dict[str, Any]:
    """A stage as JSON: every raw score, so that any statistic can be taken again later."""
    e = stage.evaluation
    return {
        "stage": stage.name,
        "style": e.style,
        "nats": e.nats,
        "coherence": e.coherence,
        "coherence_interval": e.coherence_interval(config),
        "mass": e.mass.tolist(),
        "accuracy": e.accuracy,
        "noise": list(e.noise),
        "survival": stage.survival,
        "perplexity": finite(stage.perplexity),
        "samples": len(stage.samples),
        "labels": list(e.labels),
        "log_probs": e.log_probs.tolist(),
    }


def shift_numbers(reading: Evaluation, base: Evaluation, config: EvalConfig) -> dict[str, Any]:
    """A stage's shifts from base in nats, with intervals paired by vignette."""
    return {
        "shift": reading.shift(base),
        "shift_interval": {
            name: reading.shift_interval(base, name, config) for name in FOUNDATIONS
        },
        "centred_shift": reading.centred_shift(base),
    }


def walk_numbers(walk: Walk) -> dict[str, Any]:
    """The dose walk as JSON."""
    return {
        "kappa": walk.kappa,
        "dose": walk.kappa * walk.config.alpha,
        "at_floor": walk.at_floor,
        "ladder": [
            {"kappa": k, "dose": k * walk.config.alpha, "kept": kept, "generated": n}
            for k, (kept, n) in zip(walk.kappas, walk.counts, strict=True)
        ],
    }


def healing_numbers(healing: Healed) -> dict[str, Any]:
    """Training as JSON: means per epoch, every step, and what the barrier did."""
    names = [
        f.name for f in dataclasses.fields(healing.steps[0]) if f.name not in ("epoch", "step")
    ]
    return {
        "barrier": healing.barrier,
        "moved": healing.moved,
        "tau": healing.config.tau,
        "epochs": [
            {name: healing.epoch_mean(name, epoch) for name in names}
            for epoch in range(healing.config.epochs)
        ],
        "steps": [vars(step) for step in healing.steps],
        "norms": healing.adapter.norms(),
    }


SAVE_EVERY = 20.0
"""Seconds of training between two saved states: what a killed run repeats at most."""


class Record(Lines):
    """Appends to one run folder, after what is there already; one process at a time.

    Args:
        settings: by file of `FILES`, what is run; on a folder that holds a run, what is on disk
            must be the same.
        config: for the intervals of what is measured.
        weights: hash of the model's weights; a run goes on only with those that it began with.

    Raises:
        ShlError: another process is at work on the folder, it holds something else or another
            run, it has been changed, or it cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Mapping[str, Any]],
        config: EvalConfig | None = None,
        weights: str = "",
    ) -> None:
        self.folder = folder
        self.config = config or EvalConfig()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            names = {path.name for path in folder.iterdir()}
        except OSError as error:
            raise failed(folder, error) from error
        require(
            "config.json" in names or not names - {".lock", ".config.json.tmp"},
            f"the run folder {folder} holds something else, name a new one with --out.",
        )
        self.lock = Lock(folder)
        try:
            self._open(settings, weights)
        except BaseException:
            self.lock.release()
            raise

    def _open(self, settings: Mapping[str, Mapping[str, Any]], weights: str) -> None:
        folder = self.folder
        self._events = Journal(folder / "events.jsonl")
        check_lines(self.events, read_lines(folder / "texts.jsonl"), str(folder))
        done = self.events[-1]["texts"] if self.events else 0
        self._texts = Journal(folder / "texts.jsonl", keep=done)
        for name in FILES:
            told = json.loads(json.dumps(settings[name]))
            if self.events:
                same(read_json(folder / name), told, folder / name)
            else:
                write(folder / name, json.dumps(told, indent=2) + "\n")
        for left in folder.glob("**/.*.tmp"):
            left.unlink(missing_ok=True)
        self._before = self.events[-1]["seconds"] if self.events else 0.0
        self._started = self._saved = time.monotonic()
        if self.events:
            check_files(folder, self.events[0])
            was = self.events[0]["weights"]
            require(
                was == weights,
                f"the run in {folder} began with weights {was[:12]}, these are {weights[:12]}.",
            )
        else:
            files = {name: digest(folder / name) for name in FILES}
            self.event("start", -1, {"files": files, "weights": weights})

    @property
    def events(self) -> list[Line]:
        """Every finished stage so far."""
        return self._events.lines

    @property
    def texts(self) -> list[Line]:
        """Every judged completion so far."""
        return self._texts.lines

    def event(
        self, name: str, index: int, values: Mapping[str, Any], texts: Sequence[Line] = ()
    ) -> None:
        """The line that makes a stage count, after its texts; once per stage."""
        self._texts.append(texts)
        seconds = round(self._before + time.monotonic() - self._started, 2)
        line = {"event": name, "round": index, "seconds": seconds, "texts": len(self.texts)}
        self._events.append([{**line, **values}])

    def observe(self, name: str, index: int, values: Mapping[str, Any]) -> None:
        """What `shl.love` calls: each finished stage goes to disk before the next begins."""
        if name == "stage":
            stage: Stage = values["stage"]
            if stage.name == "base":
                self.base = stage.evaluation
            assert self.base is not None
            extra = {key: values[key] for key in ("kappa", "dose") if key in values}
            numbers = stage_numbers(stage, self.config)
            numbers |= shift_numbers(stage.evaluation, self.base, self.config)
            # The steered stage's texts are those of the probe and the batches.
            own = () if stage.name == "steered" else stage.samples
            self.event("stage", index, numbers | extra, text_lines(stage.name, index, own))
        elif name == "reading":
            reading = dict(values["reading"])
            instrument, stage_name = values["instrument"], values["stage"]
            first = self.find(f"{instrument}:base", -1)
            base = reading["nats"] if first is None else first["nats"]
            reading["shift"] = {key: value - base[key] for key, value in reading["nats"].items()}
            told = {"instrument": instrument, "stage": stage_name}
            self.event("reading", index, told | reading)
        elif name == "vector":
            vector: SteeringVector = values["vector"]
            self._save(vector, index, "vector")
            self.event("vector", index, {"norms": vector.norms(), "contexts": vector.contexts})
        elif name in ("probe", "batch"):
            extra = {"batch": values["batch"]} if name == "batch" else {}
            texts = text_lines(name, index, values["verdicts"])
            self.event(name, index, walk_numbers(values["walk"]) | extra, texts)
        elif name == "step":
            if time.monotonic() - self._saved >= SAVE_EVERY:
                self._save(values["state"](), index, "training")
                self._saved = time.monotonic()
        elif name == "healed":
            self._save(values["healing"].adapter, index, "adapter")
            self.event("healing", index, healing_numbers(values["healing"]))
            self.place(index, "training").unlink(missing_ok=True)

    def _save(self, tensors: Any, index: int, name: str) -> None:
        path = self.place(index, name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise failed(path, error) from error
        tensors.save(path)

    def round(self, finished: Round, first: SteeringVector) -> None:
        """The round's own line, once all of it is done."""
        self.event(
            "round",
            finished.index,
            {
                "kappa": finished.kappa,
                "dose": finished.dose,
                "kept": len(finished.kept),
                "generated": len(finished.probes) + len(finished.dreams),
                "at_floor": finished.walk.at_floor,
                "cosine_to_first": finished.vector.cosine(first),
            },
        )


def token_curves(
    model: HookedTransformer, finished: Round, before: Sequence[Adapter]
) -> list[dict[str, Any]]:
    """Per-token KL to base of one kept, one dropped and one healed completion, each under the
    adapters and the steering that made it: the middle one of its group by tail perplexity."""
    everything = (*finished.probes, *finished.dreams)
    groups = {
        "kept": [v for v in everything if v.kept],
        "dropped": [
            v for v in everything if "incoherent" in v.reasons and len(v.completion.tokens) > 20
        ],
        "healed": [v for v in finished.healed.samples if v.completion.tokens],
    }
    curves = []
    for name, group in groups.items():
        if not group:
            continue
        v = sorted(group, key=lambda v: v.tail_perplexity)[len(group) // 2]
        if name == "healed":
            with baked(model, (*before, finished.adapter)):
                kl = token_divergence(model, v.completion)
        else:
            with baked(model, before), finished.vector.steering(model, v.completion.dose):
                kl = token_divergence(model, v.completion, without_persona(model, v.completion))
        curves.append(
            {
                "verdict": name,
                "prompt": v.completion.prompt.text,
                "reasons": list(v.reasons),
                "dose": v.completion.dose,
                "pieces": [decode(model, [t]) for t in v.completion.tokens],
                "kl": [round(float(x), 5) for x in kl],
            }
        )
    return curves


def text_lines(stage: str, index: int, verdicts: Iterable[Verdict]) -> list[Line]:
    """Judged completions as lines of texts.jsonl."""
    return [
        {
            "round": index,
            "stage": stage,
            "prompt": v.completion.prompt.text,
            "persona": v.completion.prompt.persona,
            "dose": v.completion.dose,
            "text": v.completion.text,
            "ended": v.completion.ended,
            "tokens": list(v.completion.tokens),
            "reasons": list(v.reasons),
            "perplexity": finite(v.perplexity),
            "tail_perplexity": finite(v.tail_perplexity),
        }
        for v in verdicts
    ]
