"""Write a run folder, where each finished stage is on the disk before the next begins, and what the
event of each stage holds."""

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from experiments.record.journal import Journal, Line, finite, lock, read_lines, write, write_error
from experiments.record.reader import (
    FILES,
    RecordReader,
    digest,
    of_round,
    require_same_run,
    require_unmodified,
)
from experiments.record.schema import check_lines
from experiments.record.signals import Stop
from shl.analysis.cosines import Student, nuisance_directions, students, vector_entries
from shl.config import FOUNDATIONS, EvalConfig
from shl.hooks.adapter import Adapter
from shl.hooks.bake import baked
from shl.hooks.vector import SteeringVector
from shl.measure.evaluation import Evaluation
from shl.method.axes import Axis
from shl.method.backtrack import at_own_doses
from shl.method.dose import Walk
from shl.method.filters import Verdict
from shl.method.heal import Healed, Training
from shl.method.loop import Round
from shl.method.stages import Stage
from shl.models.generate import Completion, without_persona
from shl.models.scores import token_divergence
from shl.models.tokens import decode
from shl.utils.errors import require
from shl.utils.model import Model

LOG = "log.txt"
"""What the process of a run prints, where it has no console of its own."""


NAME_MAX = 255
"""Bytes in the name of a folder, on Linux's file systems."""


def require_usable(folder: Path, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise unless a run may be kept in a folder, which need not exist yet.

    Raises:
        ShlError: the folder holds something else or another run, is in use, or cannot be written.
    """
    longest = max(folder.absolute().parts, key=lambda part: len(os.fsencode(part)))
    require(
        len(os.fsencode(longest)) <= NAME_MAX,
        f"the name {longest[:20]}... has {len(os.fsencode(longest))} bytes, a folder's may have "
        f"{NAME_MAX}.",
    )
    try:
        names = {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        names = set()
    except OSError as error:
        raise write_error(folder, error) from error
    require(
        "config.json" in names or not names - {".lock", ".config.json.tmp", LOG},
        f"the run folder {folder} holds something else, name a new one with --out.",
    )
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    require(
        os.access(existing, os.W_OK), f"{folder} cannot be written, {existing} is not writable."
    )
    if ".lock" in names:
        lock(folder).release()
    if read_lines(folder / "events.jsonl"):
        require_same_run(folder, settings)


class RecordWriter(RecordReader):
    """Appends to a run folder, after what it holds; one process at a time.

    `settings` are the contents of the files in `FILES` and `weights` the hash of the model, both as
    in the folder's run; `stop` delays signals during writes.

    Raises:
        ShlError: the folder is in use, modified, not writable, or holds something else.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Mapping[str, Any]],
        weights: str = "",
        stop: Stop | None = None,
    ) -> None:
        self.folder = folder
        self._delayed = stop.delayed if stop is not None else nullcontext
        require_usable(folder, settings)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(folder, error) from error
        self._lock = lock(folder)
        try:
            self._open(settings, weights)
        except BaseException:
            self.close()
            raise

    def _open(self, settings: Mapping[str, Mapping[str, Any]], weights: str) -> None:
        folder = self.folder
        self._events = Journal(folder / "events.jsonl")
        self.events = self._events.lines
        check_lines(self.events, read_lines(folder / "texts.jsonl"), str(folder))
        last: Line = self.events[-1] if self.events else {"texts": 0, "seconds": 0.0}
        self._texts = Journal(folder / "texts.jsonl", keep=last["texts"])
        self.texts = self._texts.lines
        for path in folder.glob("**/.*.tmp"):
            path.unlink(missing_ok=True)
        self._began = time.monotonic() - last["seconds"]
        self._cpu = time.process_time()
        if not self.events:
            for name in FILES:
                write(folder / name, json.dumps(settings[name], indent=2) + "\n")
            files = {name: digest(folder / name) for name in FILES}
            self.event("start", -1, {"files": files, "weights": weights})
            return
        require_same_run(folder, settings)  # another process may have begun it since
        require_unmodified(folder, self.events[0])
        before = self.events[0]["weights"]
        require(
            before == weights,
            f"the run in {folder} began with weights {before[:12]}, these are {weights[:12]}.",
        )
        for event in of_round(self.events, "healing"):
            self.path_of(event["round"], "training").unlink(missing_ok=True)

    def pause(self) -> None:
        """Raise `Stopped` if a signal has asked for it."""
        with self._delayed():
            pass

    def close(self) -> None:
        """Release the lock."""
        self._lock.release()

    def event(
        self, name: str, index: int, values: Mapping[str, Any], texts: Sequence[Line] = ()
    ) -> Line:
        """Write the line that finishes a stage, after its texts."""
        with self._delayed():
            self._texts.append(texts)
            seconds = round(time.monotonic() - self._began, 2)
            before, self._cpu = self._cpu, time.process_time()
            line = {
                "event": name,
                "round": index,
                "seconds": seconds,
                "cpu": round(self._cpu - before, 2),
                "texts": len(self.texts),
            }
            self._events.append([{**line, **values}])
        return self.events[-1]

    def save(self, tensors: SteeringVector | Adapter | Training, index: int, name: str) -> None:
        """Write a tensor file of a round."""
        path = self.path_of(index, name)
        with self._delayed():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise write_error(path, error) from error
            tensors.save(path)

    def copy(self, event: Line, other: RecordReader) -> Line:
        """Write a stage that another run has finished with the same result."""
        if event["event"] == "vector":
            path = other.path_of(event["round"], "vector")
            self.save(SteeringVector.load(path), event["round"], "vector")
        values = {k: v for k, v in event.items() if k not in ("event", "round", "seconds", "texts")}
        return self.event(event["event"], event["round"], values, other.texts_of(event))


NUISANCE_CONTEXTS = 16
"""Contexts for base's nuisance directions and the nulls of cosines to them [count]."""

Beside = tuple[Student | None, dict[str, SteeringVector]]
"""Base's residuals under the personas, for the nulls, and its nuisance directions."""


def beside(model: Model, axis: Axis, layers: Iterable[int]) -> Beside:
    """What the vectors of a run on these layers are compared with, from base; there are no
    residuals for an axis of one context, which has no null distribution."""
    layers, contexts = sorted(layers), min(NUISANCE_CONTEXTS, len(axis.contexts))
    directions = nuisance_directions(model, axis, layers, contexts=contexts)
    if contexts < 2:
        return None, directions
    (student,) = students(model, axis, [[]], layers, contexts=contexts)
    return student, directions


def round_numbers(finished: Round, first: SteeringVector, beside: Beside) -> dict[str, Any]:
    """A round's summary as JSON."""
    student, nuisance = beside
    entries = list(vector_entries([finished.vector], [student] if student else None, nuisance))
    cosines = {
        name: {str(e.layer): (cosine := e.to_nuisance[name]) and vars(cosine) for e in entries}
        for name in nuisance
    }
    return {
        "kappa": finished.kappa,
        "dose": finished.dose,
        "kept": len(finished.kept),
        "generated": len(finished.probes) + len(finished.dreams),
        "at_floor": finished.walk.at_floor,
        "cosine_to_first": finished.vector.cosine(first),
        "nuisance": cosines,
    }


def stage_numbers(stage: Stage, config: EvalConfig) -> dict[str, Any]:
    """A stage as JSON, with every raw score, so that any statistic can be computed later."""
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


def shift_numbers(evaluation: Evaluation, base: Evaluation, config: EvalConfig) -> dict[str, Any]:
    """A stage's shifts from base in nats, with intervals paired by vignette."""
    intervals = {name: evaluation.shift_interval(base, name, config) for name in FOUNDATIONS}
    return {
        "shift": evaluation.shift(base),
        "shift_interval": intervals,
        "centred_shift": evaluation.centred_shift(base),
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
    """Training as JSON: means per epoch, every step, and whether the barrier held."""
    names = [name for name in vars(healing.steps[0]) if name not in ("epoch", "step")]
    if healing.steps[0].reward is None:
        names.remove("reward")
    epochs = range(healing.epochs)
    return {
        "barrier": healing.barrier,
        "moved": healing.moved,
        "tau": healing.config.tau,
        "epochs": [{n: healing.epoch_mean(n, epoch) for n in names} for epoch in epochs],
        "steps": [
            {n: getattr(step, n) for n in ("epoch", "step", *names)} for step in healing.steps
        ],
        "norms": healing.adapter.norms(),
    }


def text_lines(
    stage: str, index: int, verdicts: Iterable[Verdict], model: Model | None = None
) -> list[Line]:
    """Judged completions as lines of texts.jsonl; with the model, those that were rewound have the
    text of each token too."""
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
            "topic": finite(v.topic),
            **_backtracking(v.completion, model),
        }
        for v in verdicts
    ]


def _backtracking(c: Completion, model: Model | None) -> dict[str, Any]:
    if not c.rewinds:
        return {}
    found: dict[str, Any] = {"doses": list(c.doses), "rewinds": [list(r) for r in c.rewinds]}
    if model is not None:
        found["pieces"] = [decode(model, [token]) for token in c.tokens]
    return found


def token_curves(model: Model, finished: Round, before: Sequence[Adapter]) -> list[dict[str, Any]]:
    """Per-token KL to base of one kept, one dropped and one healed completion, each under the
    hooks with which it was generated: the median of its group by tail perplexity."""
    verdicts = (*finished.probes, *finished.dreams)
    dropped = [v for v in verdicts if "incoherent" in v.reasons and len(v.completion.tokens) > 20]
    groups = {
        "kept": [v for v in verdicts if v.kept and v.completion.tokens],
        "dropped": dropped,
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
            with (
                baked(model, before),
                finished.vector.steering(model, v.completion.dose),
                at_own_doses(model, [v.completion]),
            ):
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
