"""The arm without training: the first round's vector at each dose of the ladder."""

from pathlib import Path
from typing import Any

from experiments.record.journal import Journal, read_lines, write_error
from experiments.record.reader import RecordReader
from experiments.record.resume import scores
from experiments.record.signals import Stop
from experiments.record.writer import shift_numbers, stage_numbers, text_lines
from shl.config import LoopConfig
from shl.hooks.vector import SteeringVector
from shl.measure.continuations import item_instruments
from shl.measure.vignettes import reading, remember_base
from shl.method.axes import Axis
from shl.method.dose import ladder
from shl.method.loop import measure
from shl.utils.errors import require
from shl.utils.model import Model

FILE = "doses.jsonl"


def measure_doses(
    path: Path,
    record: RecordReader,
    model: Model,
    axis: Axis,
    loop: LoopConfig,
    stop: Stop,
) -> None:
    """One line per dose: the steered base model, measured like every other stage.

    Args:
        path: the journal; doses that it holds are not measured again.
        record: a run that has measured base and extracted its first vector.

    Raises:
        ShlError: the journal belongs to another run, or the run has no base or vector.
    """
    journal = begun(path, record)
    line = record.find("base", -1)
    require(
        line is not None and record.find("vector", 0) is not None,
        f"{record.folder} has no base reading or no first vector yet.",
    )
    assert line is not None
    base = reading(line["style"], scores(line), scores(line))
    remember_base(model, base)
    vector = SteeringVector.load(record.path_of(0, "vector"))
    instruments = item_instruments(axis.cloze, loop.eval.conflicts)
    done = {entry["dose"] for entry in journal.lines[1:]}
    for kappa in reversed(ladder(loop.dose)):
        dose = kappa * loop.dose.alpha
        if dose in done:
            continue
        with vector.steering(model, dose):
            stage = measure(model, axis, loop, "steered")
            readings = {name: read(model, None) for name, read in instruments.items()}
        numbers = stage_numbers(stage, loop.eval)
        numbers |= shift_numbers(stage.evaluation, base, loop.eval)
        numbers["items"] = {name: values["items"] for name, values in readings.items()}
        texts = text_lines("steered", 0, stage.samples)
        with stop.delayed():
            journal.append([{"round": 0, "dose": dose, **numbers, "answers": texts}])


def begun(path: Path, record: RecordReader) -> Journal:
    """Open a journal of measurements on a run, whose first line identifies the run.

    Raises:
        ShlError: it belongs to another run, or cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path, error) from error
    journal = Journal(path)
    identity = {key: record.events[0][key] for key in ("files", "weights")}
    if not journal.lines:
        journal.append([identity])
    require(
        journal.lines[0] == identity,
        f"{path} belongs to another run, name a new folder with --out.",
    )
    return journal


def read_doses(path: Path) -> list[dict[str, Any]]:
    """The measured doses, from the lowest."""
    return sorted(read_lines(path)[1:], key=lambda line: abs(line["dose"]))
