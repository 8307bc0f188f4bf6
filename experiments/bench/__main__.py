"""Run the bench: `python -m experiments.bench [kernel decode heal start bridge ray]`."""

import importlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table

from experiments.bench.measure import machine
from experiments.record.command import command

Part = Literal["kernel", "decode", "heal", "start", "bridge", "ray"]


@dataclass(frozen=True)
class BenchConfig:
    """Which parts of the bench run."""

    parts: tyro.conf.Positional[tuple[Part, ...]] = (
        "kernel",
        "decode",
        "heal",
        "start",
        "bridge",
        "ray",
    )
    """Default all."""
    out: Path = Path("runs/bench")
    """Folder of the JSON files."""


def bench(config: BenchConfig) -> None:
    """Run the parts, print a table of each, and write its JSON file."""
    console = Console(width=130)
    on = machine()
    console.print(on, highlight=False)
    config.out.mkdir(parents=True, exist_ok=True)
    for part in config.parts:
        module = importlib.import_module(f"experiments.bench.{part}")
        started = time.perf_counter()
        rows = module.bench()
        seconds = time.perf_counter() - started
        table = Table("what", "ratio", "target", "ours", "theirs", "note")
        table.title = f"{part} ({seconds:.0f} s)"
        for row in rows:
            table.add_row(*row.cells())
        console.print(table)
        kept = {"machine": on, "seconds": seconds, "rows": [asdict(row) for row in rows]}
        (config.out / f"{part}.json").write_text(json.dumps(kept, indent=2) + "\n")


if __name__ == "__main__":
    command(bench, BenchConfig, __doc__)
