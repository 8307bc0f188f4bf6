"""Files and printed summary of the arms, from their records alone."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.arms.compare import points, table
from experiments.arms.tables import (
    columns,
    legend,
    question,
    sentence,
    text_kl_sentences,
    verdicts,
)
from experiments.arms.text_kl import FILE as TEXTS
from experiments.arms.text_kl import method_tau, read_texts, summary
from experiments.record.command import command, say, wide_console
from experiments.record.journal import write
from experiments.record.status import RunFolder
from experiments.report.report import report
from experiments.report.tables import markdown
from shl.utils.errors import require


def compare(folder: Path, console: Console) -> None:
    """Print table and verdicts; write arms.md, arms.json, report.html and the PNGs.

    Raises:
        ShlError: the folder has no arm that has measured base, or a record is damaged.
    """
    # matplotlib is slow to import and only needed at the end.
    from experiments.arms.page import write_page
    from experiments.arms.plots import charts
    from experiments.report.figures import write_pngs

    found = points(folder)
    require(bool(found), f"{folder} holds no arm that has measured base.")
    rows, answers = columns(found), verdicts(found)
    listed = "".join(f"- {question(v)} {sentence(v)}\n" for v in answers)
    texts = [t for path in sorted(folder.glob(f"steered/seed*/{TEXTS}")) for t in read_texts(path)]
    values: dict[str, Any] = {"arms": table(found), "verdicts": answers}
    if texts:
        values["texts"] = summary(texts)
        listed += "".join(f"- {line}\n" for line in text_kl_sentences(values["texts"]))
    for text in (markdown(rows), listed):
        console.print(text, markup=False, highlight=False)
    write(folder / "arms.md", f"{markdown(rows)}\n{listed}\n{legend()}")
    write(folder / "arms.json", json.dumps(values, indent=2) + "\n")
    figures = charts(found, texts, method_tau(folder) if texts else None)
    write_pngs(folder, figures.values())
    write_page(folder, found, texts, figures)


def show(config: RunFolder) -> None:
    """Make the report of a run folder, or of a folder of arms."""
    folder, console = config.folder, wide_console()
    if (folder / "events.jsonl").exists() or not any(folder.glob("*/seed*/events.jsonl")):
        report(folder, console)
    else:
        compare(folder, console)
    say(console, f"page: {folder / 'report.html'}")


def main() -> None:
    """The command line: a run folder, or that of arms."""
    command(show, RunFolder, __doc__)


if __name__ == "__main__":
    main()
