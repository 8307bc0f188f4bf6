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

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformer_lens import HookedTransformer

from experiments.checks import check_lines
from experiments.folder import FILES, check_files, digest, read_json, same
from experiments.journal import Journal, Line, Lock, failed, read_lines, write
from experiments.lines import Lines
from experiments.numbers import (
    finite,
    healing_numbers,
    shift_numbers,
    stage_numbers,
    walk_numbers,
)
from shl.bake import baked
from shl.config import EvalConfig
from shl.errors import check
from shl.filters import Verdict
from shl.generate import without_persona
from shl.loop import Round
from shl.lora import Adapter
from shl.scores import token_divergence
from shl.stages import Stage
from shl.tokens import decode
from shl.vector import SteeringVector

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
        check(
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
            check(
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
