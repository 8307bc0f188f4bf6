"""Run the study: `python -m experiments.run --axis care_auth`."""

import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from experiments.diary import diary
from experiments.record import Record, read, write
from experiments.summary import answers, rows
from shl.axes import load_axis
from shl.config import LoopConfig
from shl.errors import ShlError
from shl.loop import baselines, love
from shl.lora import Adapter
from shl.models import load_model
from shl.vector import SteeringVector


@dataclass(frozen=True)
class RunConfig:
    """Steer, filter, heal, repeat, and measure every round."""

    axis: str = "care_auth"
    """Built-in axis (care_auth, love) or the path of your own TOML file."""
    model: str = "gemma-3-270m"
    """Embedded model (gemma-3-270m, smollm2-135m-instruct), hub name, or local folder."""
    out: Path | None = None
    """Run folder, new or empty; default runs/AXIS-MODEL-TIME."""
    device: str | None = None
    """Where the model lives; default CUDA if there is any, else the CPU."""
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")] = field(default_factory=LoopConfig)
    """The settings of every stage."""


# Seconds that each stage takes relative to the others on a CPU; they only steer the time left.
_WEIGHTS = {"measure": 5.0, "vector": 1.5, "probe": 5.0, "batch": 5.0, "steered": 3.0, "heal": 12.0}


class Bar:
    """One progress bar over the whole run: stage, round, time left."""

    def __init__(self, config: LoopConfig, console: Console) -> None:
        round_weight = sum(_WEIGHTS.values())
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
            "base", total=3 * _WEIGHTS["measure"] + config.rounds * round_weight
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
        if name == "stage":
            stage = values["stage"].name
            then = {"base": "prompted +", "prompted+": "prompted -", "steered": "healing"}
            weight = _WEIGHTS["steered" if stage == "steered" else "measure"]
            after["stage"] = (then.get(stage, "extracting the vector"), weight)
            index = index + 1 if stage in ("healed", "prompted-") else index
        what, weight = after[name]
        self.progress.advance(self.task, weight)
        self.say(what, min(index, self.config.rounds - 1))


def run(config: RunConfig, console: Console) -> Path:
    """Run the study and return its folder.

    Raises:
        ShlError: bad input, too few survivors, or numbers that are not finite.
    """
    axis = load_axis(config.axis)
    needed = config.loop.vector.contexts
    if needed > len(axis.contexts):
        raise ShlError(f"vector.contexts is {needed}, axis {axis.name!r} has {len(axis.contexts)}.")
    stamp = time.strftime("%Y%m%d-%H%M%S")
    name = config.model.rstrip("/").split("/")[-1]
    folder = config.out or Path("runs") / f"{axis.name}-{name}-{stamp}"
    settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    console.print(f"loading {config.model} (the first start converts its weights, about a minute)")
    model = load_model(config.model, device=config.device)
    record = Record(folder, settings, str(model.cfg.device))
    bar = Bar(config.loop, console)

    def observe(event: str, index: int, values: Mapping[str, Any]) -> None:
        record.observe(event, index, values)
        bar.observe(event, index, values)

    adapters: list[Adapter] = []
    first: SteeringVector | None = None
    with bar.progress:
        baselines(model, axis, config.loop, observe)
        for finished in love(model, axis, config.loop, observe=observe):
            first = first or finished.vector
            record.round(finished, first)
            if finished.index == 0:
                record.token_curves(model, finished, adapters)
            adapters.append(finished.adapter)
    record.event("end", config.loop.rounds - 1, {})
    return folder


def report(folder: Path, console: Console) -> None:
    """Table, answers, pictures and diary of a run folder, from its record alone."""
    # matplotlib is slow to import and only needed at the end.
    from experiments.plot import draw

    config, events, texts = read(folder)
    axis = load_axis(config["axis"])
    table = Table(title=f"{config['model']}, axis {axis.name}, seed {config['loop']['seed']}")
    lines = rows(events)
    columns = list(dict.fromkeys(key for line in lines for key in line))
    for column in columns:
        table.add_column(column, justify="left" if column == "stage" else "right")
    for line in lines:
        table.add_row(*(line.get(column, "") for column in columns))
    console.print(table)
    found = answers(events, texts, axis)
    for question, answer in found.items():
        console.print(f"[bold]{question}[/] {answer}", highlight=False)
    markdown = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    markdown += ["| " + " | ".join(line.get(c, "") for c in columns) + " |" for line in lines]
    write(folder / "table.md", "\n".join(markdown) + "\n")
    write(folder / "answers.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    write(folder / "diary.md", diary(texts, config["loop"]["rounds"]))
    draw(folder)
    ended = next((e["seconds"] for e in events if e["event"] == "end"), None)
    if ended is not None:
        console.print(f"{ended / 60:.1f} minutes")


def main() -> None:
    """The command line; bad input ends with one sentence and status 2."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    config = tyro.cli(RunConfig, description=__doc__)
    console = Console(width=max(120, Console().width), soft_wrap=True)
    try:
        folder = run(config, console)
        report(folder, console)
    except ShlError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"run folder: {folder}")


if __name__ == "__main__":
    main()
