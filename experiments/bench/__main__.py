"""Run the bench: `python -m experiments.bench [kernel decode heal start]`."""

import argparse
import importlib
import json
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiments.bench.measure import machine

PARTS = ("kernel", "decode", "heal", "start")


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the JSON")
    given = parser.parse_args()
    unknown = set(given.parts) - set(PARTS)
    if unknown:
        parser.error(f"{sorted(unknown)} are no parts, there are {', '.join(PARTS)}")
    console = Console(width=130)
    on = machine()
    console.print(on, highlight=False)
    given.out.mkdir(parents=True, exist_ok=True)
    for part in given.parts or PARTS:
        module = importlib.import_module(f"experiments.bench.{part}")
        started = time.perf_counter()
        rows = module.bench()
        seconds = time.perf_counter() - started
        table = Table(title=f"{part} ({seconds:.0f} s)")
        for column in ("what", "ratio", "target", "ours", "theirs", "note"):
            table.add_column(column)
        for row in rows:
            table.add_row(*row.cells())
        console.print(table)
        kept = {"machine": on, "seconds": seconds, "rows": [row.json() for row in rows]}
        (given.out / f"{part}.json").write_text(json.dumps(kept, indent=2) + "\n")


if __name__ == "__main__":
    main()
