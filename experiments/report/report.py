"""Table, answers, page, pictures and diary of a run folder, from its record alone:
`python -m experiments.report.report [RUN]`.
"""

import json
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.questions.answers import answer_all, as_json
from experiments.record.journal import write
from experiments.record.reader import axis_of, read
from experiments.report.diary import diary
from experiments.report.page import write_page
from experiments.report.tables import rows
from shl.config import EvalConfig


def report(folder: Path, console: Console) -> None:
    """Table, answers, page, pictures and diary of a run folder, from its record alone."""
    # matplotlib is slow to import and only needed at the end.
    from experiments.report.plots import draw

    config, events, texts = read(folder)
    axis = axis_of(folder)
    title = f"{config['model']}, axis {axis.name}, seed {config['loop']['seed']}"
    table = Table(title=escape(title))
    lines = rows(events)
    columns = list(dict.fromkeys(key for line in lines for key in line))
    for column in columns:
        table.add_column(column, justify="left" if column == "stage" else "right")
    for line in lines:
        table.add_row(*(line.get(column, "") for column in columns))
    console.print(table)
    for line in (e for e in events if e["event"] == "validity"):
        verdict = "valid" if line["valid"] else "not valid"
        console.print(f"[bold]{line['instrument']}[/] {verdict} here: {escape(line['reason'])}")
    found = answer_all(events, texts, axis, EvalConfig(**config["loop"]["eval"]))
    for a in found:
        console.print(f"[bold]{a.key}: {a.question}[/] {escape(a.sentence)}", highlight=False)
    markdown = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    markdown += ["| " + " | ".join(line.get(c, "") for c in columns) + " |" for line in lines]
    write(folder / "table.md", "\n".join(markdown) + "\n")
    write(folder / "answers.json", json.dumps(as_json(found), indent=2, ensure_ascii=False) + "\n")
    write(folder / "diary.md", diary(texts))
    write_page(folder)
    draw(folder)
    ended = next((e["seconds"] for e in events if e["event"] == "end"), None)
    if ended is not None:
        console.print(f"{ended / 60:.1f} minutes")
