"""Table, verdicts, pictures and page of the arms, from their records alone."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.arms.compare import points, table
from experiments.arms.page import write_page
from experiments.arms.tables import (
    columns,
    kinds_words,
    legend,
    markdown,
    question,
    sentence,
    verdicts,
)
from experiments.arms.text_kl import FILE as TEXTS
from experiments.arms.text_kl import kinds_tau, read_kinds, summary
from experiments.record.command import command, say, wide_console
from experiments.record.journal import write
from experiments.record.status import RunFolder
from experiments.report.report import report
from shl.utils.errors import require
from shl.utils.files import write_whole


def compare(folder: Path, console: Console) -> None:
    """Table, verdicts, pictures and page, from the records alone.

    Raises:
        ShlError: the folder holds no arm that has measured base, or a record was changed.
    """
    # matplotlib is slow to import and only needed at the end.
    from matplotlib import pyplot as plt

    from experiments.arms.plots import kinds, plane

    found = points(folder)
    require(bool(found), f"{folder} holds no arm that has measured base.")
    rows, told = columns(found), verdicts(found)
    words = "".join(f"- {question(v)} {sentence(v)}\n" for v in told)
    texts = [t for path in sorted(folder.glob(f"steered/seed*/{TEXTS}")) for t in read_kinds(path)]
    values: dict[str, Any] = {"arms": table(found), "verdicts": told}
    pictures = {"arms": plane(found)}
    if texts:
        values["texts"] = summary(texts)
        pictures["kinds"] = kinds(texts, kinds_tau(folder))
        words += "".join(f"- {line}\n" for line in kinds_words(values["texts"]))
    for text in (markdown(rows), words):
        console.print(text, markup=False, highlight=False)
    write(folder / "arms.md", f"{markdown(rows)}\n{words}\n{legend()}")
    write(folder / "arms.json", json.dumps(values, indent=2) + "\n")
    for name, figure in pictures.items():
        picture = BytesIO()
        figure.savefig(picture, format="png", dpi=130)
        write_whole(folder / f"{name}.png", picture.getvalue())
        plt.close(figure)
    write_page(folder, found, texts)


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
