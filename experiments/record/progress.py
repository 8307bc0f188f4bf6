"""One progress bar over the whole run: stage, round, time left."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from shl.config import LoopConfig

# Seconds that each stage takes relative to the others on a CPU; they only steer the time left.
_WEIGHTS = {"measure": 5.0, "vector": 1.5, "probe": 5.0, "batch": 5.0, "steered": 3.0, "heal": 12.0}
_READING = 20.0
"""What an instrument of somebody else's takes per stage."""


class Bar:
    """One progress bar over the whole run: stage, round, time left."""

    def __init__(self, config: LoopConfig, console: Console, instruments: int = 0) -> None:
        reading = _READING * instruments
        round_weight = sum(_WEIGHTS.values()) + 2 * reading
        self.config = config
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
        )
        self.task = self.progress.add_task(
            "base", total=3 * (_WEIGHTS["measure"] + reading) + config.rounds * round_weight
        )

    def say(self, what: str, index: int) -> None:
        """Show what runs now."""
        where = f"round {index + 1}/{self.config.rounds}: " if index >= 0 else ""
        self.progress.update(self.task, description=f"{where}{what}")

    def observe(self, name: str, index: int, values: Mapping[str, Any]) -> None:
        """Advance after a finished stage."""
        after = {
            "vector": ("probing doses", _WEIGHTS["vector"]),
            "probe": ("dreaming", _WEIGHTS["probe"]),
            "batch": ("measuring steered", _WEIGHTS["batch"] if values.get("batch") == 0 else 0.0),
            "healed": ("measuring healed", 0.0),
        }
        if name == "step":
            step, total = values["step"], values["total"]
            self.progress.advance(self.task, _WEIGHTS["heal"] / total)
            self.say(f"healing {step.step + 1}/{total}, D {step.d:.2f}", index)
            return
        if name == "reading":
            self.progress.advance(self.task, _READING)
            return
        if name == "stage":
            stage = values["stage"].name
            then = {"base": "prompted +", "prompted+": "prompted -", "steered": "healing"}
            weight = _WEIGHTS["steered" if stage == "steered" else "measure"]
            after["stage"] = (then.get(stage, "extracting the vector"), weight)
            index = index + 1 if stage in ("healed", "prompted-") else index
        what, weight = after[name]
        self.progress.advance(self.task, weight)
        self.say(what, min(index, self.config.rounds - 1))

    def recalled(self, name: str, index: int, values: Mapping[str, Any]) -> None:
        """Advance past a stage that an earlier process finished."""
        if name == "healed":
            self.progress.advance(self.task, _WEIGHTS["heal"])
        if name == "training":
            done = len(values["state"].steps)
            heal, texts = self.config.heal, self.config.dose.min_train
            total = heal.epochs * -(-texts // heal.batch_size)
            self.progress.advance(self.task, _WEIGHTS["heal"] * min(1.0, done / total))
            return
        self.observe(name, index, values)
