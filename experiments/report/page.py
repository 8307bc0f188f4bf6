"""report.html: a run on one page, from its record alone.

The page loads nothing from outside. The same record gives the same bytes in every process; only
the section `cost` depends on the processes that made the run.
"""

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from experiments.questions.answers import answer_all
from experiments.questions.thresholds import COHERENT, KEEPS, RISES
from experiments.record.journal import read_lines, write
from experiments.record.reader import Event, axis_of, of_round, read, read_json
from experiments.record.schema import name_of
from experiments.record.status import remaining
from experiments.report.escape import clean
from experiments.report.figures import PALETTE, Chart, write_pngs
from experiments.report.plots import charts, tau_of
from experiments.report.tables import columns_of, ladders, rows
from shl.config import EvalConfig
from shl.kl import aggregate
from shl.method.axes import Axis
from shl.utils.errors import require

HEAT = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Edges between the shades of a token's divergence [nats]."""
PNGS = ("trajectory", "plane", "kl_tokens")
"""Charts that are written as PNG files too."""


@dataclass(frozen=True)
class Heat:
    """A completion token by token: text, divergence, shade (0 to 7), whether above tau."""

    verdict: str
    prompt: str | None
    reasons: tuple[str, ...]
    dose: float
    tokens: tuple[tuple[str, float, int, bool], ...]
    sizes: Mapping[str, float]
    over: int


def heat(curve: Mapping[str, Any], tau: float) -> Heat:
    """One completion of a token_kl event.

    Example:
        >>> found = heat(
        ...     {"verdict": "kept", "reasons": [], "dose": 1.0, "pieces": ["a", "b"],
        ...      "kl": [0.0, 4.0]}, 0.5)
        >>> found.tokens, found.sizes["mean"], found.over
        ((('a', 0.0, 0, False), ('b', 4.0, 6, True)), 2.0, 1)
    """
    kl = curve["kl"]
    tokens = tuple(
        (piece, value, bisect.bisect_right(HEAT, value), value > tau)
        for piece, value in zip(curve["pieces"], kl, strict=True)
    )
    return Heat(
        curve["verdict"],
        curve.get("prompt"),
        tuple(curve["reasons"]),
        curve["dose"],
        tokens,
        sizes(kl),
        sum(token[3] for token in tokens),
    )


def sizes(kl: Sequence[float]) -> dict[str, float]:
    """The aggregates of a completion's divergences: mean, rmse, p95 (linearly interpolated), max.

    Example:
        >>> {name: round(v, 2) for name, v in sizes([0.0] * 56 + [3.8, 4.2, 6.7, 8.1]).items()}
        {'mean': 0.38, 'rmse': 1.54, 'p95': 3.82, 'max': 8.1}
    """
    tokens = torch.tensor(kl, dtype=torch.float64)
    return {how: float(aggregate(tokens, how)) for how in ("mean", "rmse", "p95", "max")}


def heats(events: Sequence[Event], tau: float) -> list[tuple[int, list[Heat]]]:
    """Every round's completions."""
    return [
        (e["round"], [heat(curve, tau) for curve in e["curves"]])
        for e in of_round(events, "token_kl")
    ]


@dataclass(frozen=True)
class Instrument:
    """An instrument's readings, and whether it is valid on this model."""

    name: str
    valid: bool | None
    reason: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]

    @property
    def sentence(self) -> str:
        """Validity and its reason, for display beside the instrument's numbers."""
        if self.valid is None:
            return "not checked on this model"
        return f"{'valid' if self.valid else 'not valid'} on this model: {self.reason}"


def instruments(events: Sequence[Event]) -> dict[str, Instrument]:
    """By name, every instrument with a `validity` or a `reading` event."""
    checks = {e["instrument"]: e for e in events if e["event"] == "validity"}
    readings: dict[str, list[Event]] = {name: [] for name in checks}
    for e in events:
        if e["event"] == "reading":
            readings.setdefault(e["instrument"], []).append(e)
    found = {}
    for name, lines in readings.items():
        numbers = [dict(_numbers(e)) for e in lines]
        columns = tuple(dict.fromkeys(key for line in numbers for key in line))
        rows = tuple(
            (_label(e), tuple(f"{line[c]:.3g}" if c in line else "" for c in columns))
            for e, line in zip(lines, numbers, strict=True)
        )
        check = checks.get(name)
        valid, reason = (check["valid"], check["reason"]) if check else (None, "")
        found[name] = Instrument(name, valid, reason, columns, rows)
    return found


def _label(e: Event) -> str:
    stage = e.get("stage", "reading")
    return stage if e["round"] < 0 else f"{stage} {e['round']}"


def _numbers(e: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number that a reading measured, nested ones under dotted names."""
    for key, value in e.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}.")
        elif type(value) in (int, float) and (prefix or key not in ("round", "seconds", "texts")):
            yield f"{prefix}{key}", float(value)


MARKS = {"yes": "\u2713", "no": "\u2717", "undecided": "?"}
"""Verdicts and their signs; any other verdict is information without a yes or no."""


@dataclass(frozen=True)
class Card:
    """A question and its answer; `mark` is empty where the answer is only information."""

    key: str
    question: str
    verdict: str
    sentence: str

    @property
    def mark(self) -> str:
        """Sign of the verdict."""
        return MARKS.get(self.verdict, "")


def cards(
    events: Sequence[Event], texts: Sequence[Event], axis: Axis, config: EvalConfig
) -> list[Card]:
    """The answers, the overall one first, each sentence without the verdict that it begins with."""
    return [
        Card(
            a.key if a.key.startswith("Q") else "",
            a.question,
            a.verdict,
            a.sentence.removeprefix(f"{a.verdict.capitalize()}. "),
        )
        for a in sorted(
            answer_all(events, texts, axis, config), key=lambda answer: answer.key != "worked"
        )
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


@dataclass(frozen=True)
class Story:
    """One prompt down the rounds: base's text, then (round, steered, healed)."""

    prompt: str
    base: Event | None
    rounds: tuple[tuple[int, Event | None, Event | None], ...]


def stories(texts: Sequence[Event], most: int = 4) -> list[Story]:
    """The prompts with answers of most stages, in order of the texts; of several answers of a stage
    the first one, a full batch before the ladder."""
    found: dict[str, dict[tuple[str, int], Event]] = {}
    for stage in ("base", "healed", "batch", "probe"):
        for t in texts:
            if t["stage"] == stage:
                side = "steered" if stage in ("batch", "probe") else stage
                found.setdefault(t["prompt"], {}).setdefault((side, t["round"]), t)
    rounds = sorted({t["round"] for t in texts if t["round"] >= 0})
    order = sorted(found, key=lambda prompt: -len(found[prompt]))[:most]
    return [
        Story(
            prompt,
            found[prompt].get(("base", -1)),
            tuple(
                (i, found[prompt].get(("steered", i)), found[prompt].get(("healed", i)))
                for i in rounds
            ),
        )
        for prompt in (p for p in found if p in order)
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
    for index in sorted({e["round"] for e in events}):
        end = [e["seconds"] for e in events if e["round"] == index][-1]
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
    if not peaks:
        listed.append(
            ("peak memory", "not on record: no process of this run has exited normally yet")
        )
    return listed


def glossary(confidence: float) -> tuple[tuple[str, str], ...]:
    """The meaning and unit of every number on the page."""
    return (
        ("shift [nats]", "log of a foundation's mean probability over all vignettes, minus base's; "
         "on the axis it should have the sign marked \u25b2 (up) or \u25bc (down)"),
        ("care_nats, auth_nats [nats]", "that log itself; 0 is certainty; (noise) means that base "
         "does not discriminate this foundation"),
        ("coherence [ratio]", f"probability on valid answers over base's; 1 is base, Q2 needs "
         f"{COHERENT:g} or more in every round"),
        ("survival [share]", "texts that pass the filter; 1 is all"),
        ("base ppl [exp nats per token]", "median perplexity of a stage's texts under base; lower "
         f"is more ordinary, Q0 needs a rank correlation with the dose above {RISES:g}"),
        ("kept/gen [count]", "completions kept for training, out of those generated in the round"),
        ("kappa, dose", "dose multiplier, and how many times the raw vector is added"),
        ("tau [nats]", "where the barrier starts; tokens above it are outlined"),
        ("D [nats]", "KL of the student to its reference, aggregated over a completion's tokens"),
        ("> tau [share]", "training tokens whose KL is above tau in the last epoch"),
        ("lam", "the barrier's weight in the loss"),
        ("on-axis shift kept", f"healed over steered on-axis shift; Q1 needs {KEEPS:g} or more"),
        ("intervals", f"{100 * confidence:g} %: bootstrap over vignettes for shifts and coherence, "
         "Wilson for shares"),
    )  # fmt: skip


def _cleaned(value: Any) -> Any:
    """`clean` for every text that a template prints; generated markup passes unchanged."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else clean(value)


@cache
def environment() -> Environment:
    """The templates, with escaping on and unknown names refused."""
    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=_cleaned,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.globals["palette"] = PALETTE
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
        figures: its charts by name, see `charts`.
    """
    loop = config["loop"]
    tau = tau_of(events, loop["heal"]["tau"])
    table, found = rows(events), instruments(events)
    return (
        environment()
        .get_template("report.html")
        .render(
            config=config,
            axis=axis,
            banner=banner(events, loop["rounds"]),
            cards=cards(events, texts, axis, EvalConfig(**loop["eval"])),
            columns=columns_of(table),
            table=table,
            glossary=glossary(loop["eval"]["confidence"]),
            charts=figures or {},
            ladders=ladders(texts),
            heats=heats(events, tau),
            shades=HEAT,
            tau=tau,
            healing=of_round(events, "healing"),
            stories=stories(texts),
            vignettes=found.pop("vignettes", None),
            instruments=found,
            settings=list(flat(config)),
            versions=list(flat(versions)),
            cost=cost(events, processes),
        )
    )


def write_page(folder: Path, *, pngs: bool = False) -> Path:
    """Write report.html into a run folder, and with `pngs` the charts of `PNGS`.

    Raises:
        ShlError: no run folder, a damaged record, or a file that cannot be written.
    """
    config, events, texts = read(folder)
    axis = axis_of(folder)
    figures = charts(folder, config, axis, events, texts)
    text = page(
        config,
        read_json(folder / "versions.json"),
        axis,
        events,
        texts,
        read_lines(folder / "processes.jsonl"),
        figures,
    )
    write(folder / "report.html", text)
    if pngs:
        write_pngs(folder, [figures[name] for name in PNGS if name in figures])
    return folder / "report.html"
