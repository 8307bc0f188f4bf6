"""report.html: a run on one page, from its record alone.

The page loads nothing from outside. The same record gives the same bytes in every process; only
the section `cost` depends on the processes that made the run.
"""

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from experiments.questions.answers import answer_all
from experiments.questions.estimates import Answer
from experiments.questions.thresholds import COHERENT, KEEPS, RISES
from experiments.record.journal import read_lines, write
from experiments.record.reader import Event, axis_of, of_round, read, read_json
from experiments.record.schema import name_of
from experiments.record.status import remaining
from experiments.report.escape import clean
from experiments.report.figures import PALETTE, Chart, write_pngs
from experiments.report.plots import charts, tau_of
from experiments.report.tables import (
    ANSWER_COLUMNS,
    answer_row,
    cells,
    ladders,
    nuisance_rows,
    other_estimates,
    tables,
)
from shl.config import EvalConfig
from shl.kl import aggregate
from shl.method.axes import Axis
from shl.utils.errors import require

HEAT = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Edges between the shades of a token's divergence [nats]."""
PNGS = ("trajectory", "plane", "kl_tokens")
"""Charts that are written as PNG files too."""


def heat(curve: Mapping[str, Any], tau: float) -> dict[str, Any]:
    """One completion of a token_kl event with its tokens (text, divergence, shade from 0 to 7,
    whether above tau), their aggregates, and the count above tau.

    Example:
        >>> found = heat({"pieces": ["a", "b"], "kl": [0.0, 4.0]}, 0.5)
        >>> found["tokens"], found["sizes"]["mean"], found["over"]
        ([('a', 0.0, 0, False), ('b', 4.0, 6, True)], 2.0, 1)
    """
    kl = curve["kl"]
    tokens = [
        (piece, value, bisect.bisect_right(HEAT, value), value > tau)
        for piece, value in zip(curve["pieces"], kl, strict=True)
    ]
    over = sum(token[3] for token in tokens)
    return {"prompt": None, **curve, "tokens": tokens, "sizes": sizes(kl), "over": over}


def dosed(text: Event) -> list[tuple[str, int, float, str]]:
    """The tokens of a completion that was rewound: text, shade from 0 to 7 by the size of its dose
    over that at the start, dose, and the rewinds before it; empty for another completion.

    Example:
        >>> text = {"dose": -1.0, "pieces": ["a", "b"], "doses": [-1.0, -0.6]}
        >>> dosed(text | {"rewinds": [[1, -0.6]]})
        [('a', 7, -1.0, ''), ('b', 4, -0.6, 'rewound to here, dose -0.60')]
    """
    pieces = text.get("pieces") or ()
    marks: dict[int, list[str]] = {}
    for kept, dose in text["rewinds"] if pieces else ():
        # A rewind of tokens that a later one removed is shown where the text goes on.
        marks.setdefault(min(int(kept), len(pieces) - 1), []).append(f"dose {dose:.2f}")
    return [
        (
            piece,
            round(7 * min(1.0, abs(dose / text["dose"]))),
            dose,
            ", ".join(["rewound to here", *marks[i]]) if i in marks else "",
        )
        for i, (piece, dose) in enumerate(zip(pieces, text.get("doses") or (), strict=True))
    ]


def sizes(kl: Sequence[float]) -> dict[str, float]:
    """The aggregates of a completion's divergences: mean, rmse, p95 (linearly interpolated), max.

    Example:
        >>> {name: round(v, 2) for name, v in sizes([0.0] * 56 + [3.8, 4.2, 6.7, 8.1]).items()}
        {'mean': 0.38, 'rmse': 1.54, 'p95': 3.82, 'max': 8.1}
    """
    tokens = torch.tensor(kl, dtype=torch.float64)
    return {how: float(aggregate(tokens, how)) for how in ("mean", "rmse", "p95", "max")}


def instruments(events: Sequence[Event]) -> dict[str, dict[str, Any]]:
    """By name, validity and readings of every instrument with an event of either.

    `valid` is None where the instrument was not checked on this model; each row is a stage's name
    and its cells under `columns`.
    """
    checks = {e["instrument"]: e for e in events if e["event"] == "validity"}
    readings: dict[str, list[Event]] = {name: [] for name in checks}
    for e in events:
        if e["event"] == "reading":
            readings.setdefault(e["instrument"], []).append(e)
    found = {}
    for name, lines in readings.items():
        numbers = [dict(_numbers(e)) for e in lines]
        columns = list(dict.fromkeys(key for line in numbers for key in line))
        rows = [
            (_label(e), *(f"{line[c]:.3g}" if c in line else "" for c in columns))
            for e, line in zip(lines, numbers, strict=True)
        ]
        check = checks.get(name, {"valid": None, "reason": ""})
        found[name] = {key: check[key] for key in ("valid", "reason")} | {
            "instrument": name, "columns": columns, "rows": rows,
        }  # fmt: skip
    return found


def _label(e: Event) -> str:
    stage = e.get("stage", "reading")
    return stage if e["round"] < 0 else f"{stage} {e['round']}"


def _numbers(e: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number that a reading measured, nested ones under dotted names."""
    of_every_event = ("round", "seconds", "cpu", "texts")
    for key, value in e.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}.")
        elif type(value) in (int, float) and (prefix or key not in of_every_event):
            yield f"{prefix}{key}", float(value)


MARKS = {"yes": "\u2713", "no": "\u2717", "undecided": "?"}
"""Signs of the verdicts; any other verdict is information without a yes or no."""


def cards(
    events: Sequence[Event], texts: Sequence[Event], axis: Axis, config: EvalConfig
) -> list[Answer]:
    """The answers, the overall one first, each sentence without the verdict that it begins with."""
    return [
        replace(
            a,
            key=a.key if a.key.startswith("Q") else "",
            sentence=a.sentence.removeprefix(f"{a.verdict.capitalize()}. "),
        )
        for a in sorted(answer_all(events, texts, axis, config), key=lambda a: a.key != "worked")
    ]


def banner(events: Sequence[Event], rounds: int) -> str:
    """Notice at the top of a starved or unfinished run's page; empty for a finished one."""
    last = events[-1]
    if last["event"] == "end":
        return ""
    if last["event"] == "starved":
        return f"This run starved and ended early: {last['sentence']}"
    name = name_of(dict(last))
    where = f" of round {last['round']}" if last["round"] >= 0 else ""
    return (
        f"This run is unfinished: its record ends after {name}{where}. Remaining: "
        f"{remaining(name, last['round'], rounds)}. The page contains all results so far."
    )


Story = tuple[str, Event | None, list[tuple[int, Event | None, Event | None]]]
"""A prompt, base's text, and (round, steered, healed) of every round."""


def stories(texts: Sequence[Event], most: int = 4) -> list[Story]:
    """The `most` prompts with texts of the most stages, in order of the texts; of several texts of
    a stage the first, those of full batches before those of the ladder."""
    found: dict[str, dict[tuple[str, int], Event]] = {}
    for stage in ("base", "healed", "batch", "probe"):
        for t in texts:
            if t["stage"] == stage:
                side = "steered" if stage in ("batch", "probe") else stage
                found.setdefault(t["prompt"], {}).setdefault((side, t["round"]), t)
    rounds = sorted({t["round"] for t in texts if t["round"] >= 0})
    order = sorted(found, key=lambda prompt: -len(found[prompt]))[:most]
    return [
        (
            prompt,
            by_stage.get(("base", -1)),
            [(i, by_stage.get(("steered", i)), by_stage.get(("healed", i))) for i in rounds],
        )
        for prompt, by_stage in found.items()
        if prompt in order
    ]


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Settings as dotted names and values."""
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flat(value, f"{name}.")
        else:
            listed = isinstance(value, (list, tuple))
            yield name, ", ".join(map(str, value)) if listed else str(value)


def cost(events: Sequence[Event], processes: Sequence[Event]) -> list[tuple[str, str]]:
    """Computing time in total and per round, and the peak memory over all processes."""
    listed = [("computing", f"{events[-1]['seconds'] / 60:.1f} minutes")]
    last = 0.0
    for index, end in sorted({e["round"]: e["seconds"] for e in events}.items()):
        name = f"round {index}" if index >= 0 else "baselines"
        listed.append((name, f"{(end - last) / 60:.1f} minutes"))
        last = end
    begun = sum(p.get("event") == "begin" for p in processes)
    listed.append(("processes", f"{begun} on record"))
    peaks: dict[str, int] = {}
    for p in processes:
        found = p.get("peak_bytes", {})
        require(
            isinstance(found, dict) and all(type(size) is int for size in found.values()),
            f"a process of the run has peak_bytes {found!r}, it must be bytes by kind.",
        )
        for kind, size in found.items():
            peaks[kind] = max(size, peaks.get(kind, 0))
    listed += [(f"peak memory, {kind}", f"{size / 1e9:.2f} GB") for kind, size in peaks.items()]
    missing = ("peak memory", "not on record: no process of this run has exited normally yet")
    return listed if peaks else [*listed, missing]


def _cleaned(value: Any) -> Any:
    """`clean` applied to every text of a template, except generated markup."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else clean(value)


@cache
def environment() -> Environment:
    """The templates; text is escaped, and an undefined name is an error."""
    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=_cleaned,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.globals |= {"palette": PALETTE, "marks": MARKS, "dosed": dosed}
    return found


def page(
    config: Mapping[str, Any],
    versions: Mapping[str, Any],
    axis: Axis,
    events: Sequence[Event],
    texts: Sequence[Event],
    processes: Sequence[Event] = (),
    figures: Mapping[str, Chart] | None = None,
) -> str:
    """HTML of the page of one run.

    Args:
        config, versions: the record's files of these names.
        events, texts, processes: the lines of its journals.
        figures: by name, see `charts`.
    """
    loop = config["loop"]
    tau = tau_of(events, loop["heal"]["tau"])
    found = instruments(events)
    template = environment().get_template("report.html")
    return template.render(
        config=config,
        axis=axis,
        banner=banner(events, loop["rounds"]),
        cards=cards(events, texts, axis, EvalConfig(**loop["eval"])),
        answer_columns=ANSWER_COLUMNS,
        answer_row=answer_row,
        other_estimates=other_estimates,
        tables={label: cells(part) for label, part in tables(events).items()},
        nuisance=cells(nuisance_rows(events)),
        thresholds={"coherent": COHERENT, "keeps": KEEPS, "rises": RISES},
        charts=figures or {},
        ladders=ladders(texts),
        heats={
            e["round"]: [heat(c, tau) for c in e["curves"]] for e in of_round(events, "token_kl")
        },
        shades=HEAT,
        tau=tau,
        healing=of_round(events, "healing"),
        stories=stories(texts),
        rewound=any(t.get("rewinds") for t in texts),
        vignettes=found.pop("vignettes", None),
        instruments=found,
        settings=list(flat(config)),
        versions=list(flat(versions)),
        cost=cost(events, processes),
    )


def write_page(folder: Path, *, pngs: bool = False) -> Path:
    """Write report.html into a run folder, and with `pngs` the charts of `PNGS`.

    Raises:
        ShlError: no run folder, a damaged record, or a file that cannot be written.
    """
    config, events, texts = read(folder)
    axis = axis_of(folder)
    figures = charts(folder, config, axis, events, texts)
    versions, processes = (
        read_json(folder / "versions.json"),
        read_lines(folder / "processes.jsonl"),
    )
    text = page(config, versions, axis, events, texts, processes, figures)
    write(folder / "report.html", text)
    if pngs:
        write_pngs(folder, [figures[name] for name in PNGS if name in figures])
    return folder / "report.html"
