"""report.html of the arms, from their records alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.arms.catalogue import ARMS
from experiments.arms.compare import LEVELS, Found
from experiments.arms.tables import columns, question, sentence, text_kl_sentences, verdicts
from experiments.arms.text_kl import summary
from experiments.record.journal import Line, read_lines, write
from experiments.record.reader import axis_of, read
from experiments.report.figures import Chart
from experiments.report.page import environment
from experiments.report.tables import cells


def write_page(
    folder: Path, found: Found, texts: Sequence[Line], charts: Mapping[str, Chart]
) -> None:
    """Write report.html into the folder of the arms.

    Raises:
        ShlError: a damaged record, or a page that cannot be written.
    """
    runs = {
        name: {seed: folder / name / f"seed{seed}" for seed in by_seed}
        for name, by_seed in found.items()
        if name in ARMS
    }
    first = next(path for by_seed in runs.values() for path in by_seed.values())
    config, events, _ = read(first)
    answers = [v | {"question": question(v), "sentence": sentence(v)} for v in verdicts(found)]
    page = environment().get_template("arms.html").render(
        model=config["model"],
        axis=axis_of(first),
        seeds=sorted({seed for by_seed in runs.values() for seed in by_seed}),
        checks=[e for e in events if e["event"] == "validity"],
        strict=[v for v in answers if v["level"] == LEVELS[0]],
        verdicts=answers,
        charts=charts,
        table=cells(columns(found)),
        text_kl=text_kl_sentences(summary(texts)) if texts else [],
        arms=ARMS.values(),
        ended={
            name: {seed: _ended(path) for seed, path in sorted(by_seed.items())}
            for name, by_seed in runs.items()
        },
    )  # fmt: skip
    write(folder / "report.html", page)


def _ended(path: Path) -> str:
    last = read_lines(path / "events.jsonl")[-1]
    return {"end": "", "starved": "starved"}.get(last["event"], "unfinished")
