"""Files and printed summary of a run folder, from its record alone."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.questions.answers import answer_all, as_json
from experiments.record.journal import write
from experiments.record.reader import axis_of, read
from experiments.report.diary import diary
from experiments.report.tables import (
    ANSWER_COLUMNS,
    answer_row,
    cells,
    markdown,
    tables,
)
from shl.config import EvalConfig


def _table(lines: Sequence[Mapping[str, str]]) -> Table:
    columns, body = cells(lines)
    table = Table()
    for column in columns:
        table.add_column(column, justify="left" if column == "stage" else "right")
    for line in body:
        table.add_row(*line)
    return table


def report(folder: Path, console: Console) -> None:
    """Print table and answers; write table.md, answers.json, diary.md, report.html and the PNGs.

    Raises:
        ShlError: no run folder, or a record that is damaged.
    """
    # matplotlib is slow to import and only needed at the end.
    from experiments.report.page import write_page

    config, events, texts = read(folder)
    axis = axis_of(folder)
    title = f"{config['model']}, axis {axis.name}, seed {config['loop']['seed']}"
    console.print(f"[bold]{escape(title)}[/]", highlight=False)
    parts = tables(events).values()
    for part in parts:
        console.print(_table(part))
    for e in (e for e in events if e["event"] == "validity"):
        verdict = "valid" if e["valid"] else "not valid"
        name, reason = escape(e["instrument"]), escape(e["reason"])
        console.print(f"[bold]{name}[/] {verdict} on this model: {reason}")
    answers = answer_all(events, texts, axis, EvalConfig(**config["loop"]["eval"]))
    found = Table(title="Answers")
    for column in ANSWER_COLUMNS:
        found.add_column(column)
    for a in answers:
        found.add_row(*map(escape, answer_row(a)))
    console.print(found)
    for a in (a for a in answers if a.deciding is None):
        console.print(f"[bold]{a.key}: {a.question}[/] {escape(a.sentence)}", highlight=False)
    write(folder / "table.md", "\n".join(map(markdown, parts)))
    listed = json.dumps(as_json(answers), indent=2, ensure_ascii=False)
    write(folder / "answers.json", f"{listed}\n")
    write(folder / "diary.md", diary(texts))
    write_page(folder, pngs=True)
    if events[-1]["event"] == "end":
        console.print(f"{events[-1]['seconds'] / 60:.1f} minutes")
