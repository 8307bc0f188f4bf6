"""Stages that arms share: the baselines, and the first round up to where their settings differ."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter

from experiments.record.reader import RecordReader
from shl.config import HealConfig, LoopConfig, OnlineConfig

_LOOP = TypeAdapter(LoopConfig)


def same_result(name: str, index: int, one: LoopConfig, other: LoopConfig) -> bool:
    """Whether a stage has bit-identical results in two runs of the same model and axis.

    The baselines depend on sampling, filter and eval alone, the random vectors' readings on the
    layers too; the first round up to its steered stage on everything but training. Later rounds
    depend on an adapter.

    Args:
        name: the event's name in the record, such as "probe", or "tinymfv:base" for a reading.
    """
    stage = name.rsplit(":", 1)[-1]
    if index < 0:
        used = [(c.seed, c.generate, c.filter, c.eval) for c in (one, other)]
        layers = [c.vector.layers for c in (one, other)]
        return used[0] == used[1] and (not name.startswith("nulls:") or layers[0] == layers[1])
    if index > 0 or stage not in ("vector", "probe", "batch", "steered"):
        return False
    if stage == "vector" and one.vector.direction == "contrast":
        return (one.vector, one.seed) == (other.vector, other.seed)
    # Training and the schedule of lam over the rounds come after these stages.
    before = [replace(c, heal=HealConfig(), online=OnlineConfig(), rounds=1) for c in (one, other)]
    if stage in ("vector", "probe"):
        before = [replace(c, mode="rounds") for c in before]
    return before[0] == before[1]


class StageCache:
    """The `shared` of `experiments.run.study`: runs of the same model and axis.

    Args:
        folders: finished or unfinished runs to which no process writes.
    """

    def __init__(self, folders: Sequence[Path], config: LoopConfig) -> None:
        self.config = config
        records = map(RecordReader, folders)
        self.runs = [(r, _LOOP.validate_python(r.settings["loop"])) for r in records]

    def __call__(self, name: str, index: int) -> list[RecordReader]:
        """The runs in which a stage has the same result as in this one."""
        return [r for r, loop in self.runs if same_result(name, index, self.config, loop)]
