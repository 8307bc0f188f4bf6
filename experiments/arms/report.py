"""Files and printed summary of the arms, from their records alone."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.arms.catalogue import ARMS
from experiments.arms.compare import LEVELS, points, table
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
from experiments.record.journal import read_lines, write
from experiments.record.reader import axis_of, read
from experiments.record.status import RunFolder
from experiments.report.report import report
from experiments.report.tables import cells, markdown
from shl.utils.errors import require


def compare(folder: Path, console: Console, failed: Mapping[str, str] | None = None) -> None:
    """Print table and verdicts; write arms.md, arms.json, report.html and the PNGs.

    Args:
        failed: studies that failed, with the reason of each.

    Raises:
        ShlError: the folder has no arm that has measured base, or a record is damaged.
    """
    # matplotlib is slow to import and only needed at the end.
    from experiments.arms.plots import charts
    from experiments.report.figures import write_pngs
    from experiments.report.page import environment

    found = points(folder)
    require(bool(found), f"{folder} holds no arm that has measured base.")
    rows, answers = columns(found), verdicts(found)
    texts = [t for path in sorted(folder.glob(f"steered/seed*/{TEXTS}")) for t in read_texts(path)]
    short = starved(folder) | dict(failed or {})
    values: dict[str, Any] = {"arms": table(found), "verdicts": answers, "ended_early": short}
    values |= {"texts": summary(texts)} if texts else {}
    separation = text_kl_sentences(values["texts"]) if texts else []
    sentences = [f"{question(v)} {sentence(v)}" for v in answers] + separation
    sentences += [f"{name} ended early: {why}" for name, why in short.items()]
    listed = "".join(f"- {line}\n" for line in sentences)
    for text in (markdown(rows), listed):
        console.print(text, markup=False, highlight=False)
    begun = [arm for name, arm in ARMS.items() if (folder / name).is_dir()]
    write(folder / "arms.md", f"{markdown(rows)}\n{listed}\n{legend(begun)}")
    write(folder / "arms.json", json.dumps(values, indent=2) + "\n")
    figures = charts(found, texts, method_tau(folder) if texts else None)
    write_pngs(folder, figures.values())
    runs = {
        name: {seed: folder / name / f"seed{seed}" for seed in sorted(found[name])}
        for name in ARMS
        if name in found
    }
    first = next(path for by_seed in runs.values() for path in by_seed.values())
    config, events, _ = read(first)
    answers = [v | {"question": question(v), "sentence": sentence(v)} for v in answers]
    template = environment().get_template("arms.html")
    html = template.render(
        model=config["model"],
        axis=axis_of(first),
        seeds=sorted({seed for by_seed in runs.values() for seed in by_seed}),
        checks=[e for e in events if e["event"] == "validity"],
        strict=[v for v in answers if v["level"] == LEVELS[0]],
        verdicts=answers,
        charts=figures,
        table=cells(rows),
        text_kl=separation,
        ended_early=short,
        arms=begun,
        ended={name: {s: _ended(p) for s, p in by_seed.items()} for name, by_seed in runs.items()},
    )
    write(folder / "report.html", html)


def starved(folder: Path) -> dict[str, str]:
    """The studies that ended early because too few completions survived, with the sentence."""
    found = {}
    for path in sorted(folder.glob("*/seed*/events.jsonl")):
        last, run = read_lines(path)[-1:], path.parent
        if last and last[0]["event"] == "starved":
            name = f"{run.parent.name}, seed {run.name.removeprefix('seed')}"
            found[name] = last[0]["sentence"]
    return found


def _ended(path: Path) -> str:
    last = read_lines(path / "events.jsonl")[-1]
    return {"end": "", "starved": "starved"}.get(last["event"], "unfinished")


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
