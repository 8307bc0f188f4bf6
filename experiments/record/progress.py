"""Progress of a run: a bar in a terminal, otherwise one line per finished stage."""

import time
from collections.abc import Iterable
from itertools import accumulate

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments.record.command import say
from shl.config import LoopConfig

BASELINES = ("base", "prompted+", "prompted-")
ROUND = ("vector", "probe", "batch", "steered", "healing", "healed", "retention")
SECONDS = {
    "vector": 1.5,
    "steered": 3.0,
    "healing": 12.0,
    "reading": 20.0,
    "context": 6.0,
    "cloze": 2.0,
    "kl": 2.0,
}
"""Rough duration of a stage on a CPU, or of an instrument's reading of it; 5 if not listed."""
ACTIVITIES = {
    "vector": "extracting the vector",
    "probe": "probing doses",
    "batch": "generating",
    "healing": "healing",
    "retention": "reading retention",
}
"""What is done in a stage; the others are measured."""


def durations(config: LoopConfig, instruments: Iterable[str] = ()) -> dict[tuple[int, str], float]:
    """The stages of a run by round and name, in order, with their rough duration [s]."""
    names = [name for name in ROUND if config.dose.walk or name != "probe"]
    stages = [(-1, name) for name in BASELINES]
    stages += [(index, name) for index in range(config.rounds) for name in names]
    plan = {}
    for index, name in stages:
        plan[index, name] = SECONDS.get(name, 5.0)
        if index < 0 or name in ("steered", "healed"):
            plan |= {
                (index, f"{i}:{name}"): SECONDS.get(i, SECONDS["reading"]) for i in instruments
            }
    return plan


class StageProgress:
    """Shows how far a run is, from the names of its finished stages.

    Without a terminal it prints a line per computed stage, such as "round 0: dose probe done, 5 of
    21 stages, 1.2 min elapsed, about 6 min left".
    """

    def __init__(
        self, config: LoopConfig, console: Console, instruments: Iterable[str] = ()
    ) -> None:
        plan = durations(config, instruments)
        self.plan = list(plan)
        self.ends = dict(zip(plan, accumulate(plan.values()), strict=True))
        self.total = sum(plan.values())
        self.done = self.loaded = 0.0
        self.console = console
        self.began = time.monotonic()
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not console.is_interactive,
        )
        self.task = self.bar.add_task(label(*self.plan[0]), total=self.total)

    def finished(self, name: str, index: int, batch: int | None = None, *, loaded: bool) -> None:
        """Count a stage of the record; of several batches the first one counts."""
        end = self.ends[index, name]
        self.loaded += max(0.0, end - self.done) if loaded else 0.0
        self.done = max(self.done, end)
        number = self.plan.index((index, name)) + 1
        following = self.plan[min(number, len(self.plan) - 1)]
        self.bar.update(self.task, completed=self.done, description=label(*following))
        if loaded or self.console.is_interactive:
            return
        elapsed = time.monotonic() - self.began
        left = elapsed * (self.total - self.done) / max(self.done - self.loaded, 1.0)
        what = {"probe": "dose probe", "batch": f"batch {batch}"}.get(name, name)
        say(
            self.console,
            f"{label(index)}{what} done, {number} of {len(self.plan)} stages, "
            f"{elapsed / 60:.1f} min elapsed, about {left / 60:.0f} min left",
        )

    def step(self, index: int, step: int, total: int, d: float) -> None:
        """Show a finished training step."""
        share = (step + 1) / total
        self.bar.update(
            self.task,
            completed=self.ends[index, "healing"] - SECONDS["healing"] * (1 - share),
            description=f"{label(index, 'healing')} {step + 1}/{total}, D {d:.2f}",
        )


def label(index: int, name: str = "") -> str:
    """The round, if there is one, and what is done in a stage."""
    activity = ACTIVITIES.get(name, f"measuring {name}") if name else ""
    return (f"round {index}: " if index >= 0 else "") + activity
