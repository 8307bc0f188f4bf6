"""report.html: one page that shows a run, from its record alone.

The page holds everything it needs; the same record gives the same bytes, whatever process made
it. What tells of processes (times, memory) is in the section `cost` alone.
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
from experiments.report import page_charts, page_doses, page_inside
from experiments.report.escape import clean
from experiments.report.page_charts import Figure
from experiments.report.svg_shapes import PALETTE
from experiments.report.tables import rows
from shl.config import EvalConfig
from shl.hooks.vector import SteeringVector
from shl.kl import aggregate
from shl.method.axes import Axis
from shl.utils.errors import ShlError, require

HEAT = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Edges between the shades of a token's divergence [nats]."""


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
        >>> seen = heat(
        ...     {"verdict": "kept", "reasons": [], "dose": 1.0, "pieces": ["a", "b"],
        ...      "kl": [0.0, 4.0]}, 0.5)
        >>> seen.tokens, seen.sizes["mean"], seen.over
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
    """Whether an instrument can be trusted on this model, and what it read."""

    name: str
    valid: bool | None
    reason: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]

    @property
    def sentence(self) -> str:
        """Beside every number of the instrument."""
        if self.valid is None:
            return "not checked on this model"
        return f"{'valid' if self.valid else 'not valid'} on this model: {self.reason}"


def instruments(events: Sequence[Event]) -> dict[str, Instrument]:
    """By name, every instrument of which there is a `validity` or a `reading` event."""
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
        told = checks.get(name)
        valid, reason = (told["valid"], told["reason"]) if told else (None, "")
        found[name] = Instrument(name, valid, reason, columns, rows)
    return found


def _label(e: Event) -> str:
    stage = e.get("stage", "reading")
    return stage if e["round"] < 0 else f"{stage} {e['round']}"


def _numbers(e: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a reading but its place in the record, nested ones under dotted names."""
    for key, value in e.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}.")
        elif type(value) in (int, float) and (prefix or key not in ("round", "seconds", "texts")):
            yield f"{prefix}{key}", float(value)


MARKS = {"yes": "\u2713", "no": "\u2717", "undecided": "?", "info": "\u00b7"}


@dataclass(frozen=True)
class Card:
    """One question and its answer; `info` are figures without a yes or no."""

    key: str
    question: str
    verdict: str
    sentence: str

    @property
    def mark(self) -> str:
        """The verdict as one character."""
        return MARKS[self.verdict]


def cards(
    events: Sequence[Event], texts: Sequence[Event], axis: Axis, config: EvalConfig
) -> list[Card]:
    """The answers, the one to the whole first; a sentence's first word is its verdict, which the
    page shows apart."""
    found = answer_all(events, texts, axis, config)
    return [
        Card(
            a.key if a.key.startswith("Q") else "",
            a.question,
            a.verdict,
            a.sentence.removeprefix(f"{a.verdict.capitalize()}. "),
        )
        for a in sorted(found, key=lambda a: a.key != "worked")
    ]


def banner(events: Sequence[Event], rounds: int) -> str:
    """What is to be known before anything else is read: starved or unfinished; else nothing."""
    last = events[-1]
    if last["event"] == "end":
        return ""
    if last["event"] == "starved":
        return f"This run starved and ended early: {last['sentence']}"
    name = name_of(dict(last))
    where = f" of round {last['round']}" if last["round"] >= 0 else ""
    return (
        f"This run is unfinished: its record ends after {name}{where}; what remains: "
        f"{remaining(name, last['round'], rounds)}. The page shows what there is."
    )


@dataclass(frozen=True)
class Story:
    """One prompt down the rounds: base's text, then (round, steered, healed)."""

    prompt: str
    base: Event | None
    rounds: tuple[tuple[int, Event | None, Event | None], ...]


def stories(texts: Sequence[Event], most: int = 4) -> list[Story]:
    """The prompts that most stages answered, in the order in which they were first asked; of a
    stage's several answers the first, a full batch before the ladder."""
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
    """How long the run computed, in all and per round, and the most memory that a process held."""
    told = [("computing", f"{events[-1]['seconds'] / 60:.1f} minutes")]
    last = 0.0
    for index in sorted({e["round"] for e in events}):
        end = [e["seconds"] for e in events if e["round"] == index][-1]
        name = f"round {index}" if index >= 0 else "baselines"
        told.append((name, f"{(end - last) / 60:.1f} minutes"))
        last = end
    begun = sum(p.get("event") == "begin" for p in processes)
    told.append(("processes", f"{begun} on record"))
    peaks: dict[str, int] = {}
    for p in processes:
        found = p.get("peak_bytes", {})
        require(
            isinstance(found, dict) and all(type(size) is int for size in found.values()),
            f"a process of the run has peak_bytes {found!r}, it must be bytes by kind.",
        )
        for kind, size in found.items():
            peaks[kind] = max(size, peaks.get(kind, 0))
    told += [(f"peak memory, {kind}", f"{size / 1e9:.2f} GB") for kind, size in peaks.items()]
    if not peaks:
        told.append(("peak memory", "not on record: no process of this run has ended in order yet"))
    return told


GLOSSARY = (
    ("shift [nats]", "log of a foundation's mean probability over all vignettes, minus base's; on "
     "the axis it should have the sign marked \u25b2 (up) or \u25bc (down)"),
    ("care_nats, auth_nats [nats]", "that log itself; 0 is certainty, base's value is where it "
     "began; (noise) means base cannot tell this foundation apart"),
    ("coherence [ratio]", f"probability on valid answers over base's; 1 is base, Q2 needs "
     f"{COHERENT} or more in every round"),
    ("survival [share]", "texts that pass the filter; 1 is all"),
    ("base ppl [exp nats per token]", "median perplexity of a stage's texts under base; lower is "
     f"more ordinary, Q0 needs a rank correlation with the dose above {RISES}"),
    ("kept/gen [count]", "completions kept for training out of those generated in the round"),
    ("kappa, dose", "dose multiplier, and how many times the raw vector is added"),
    ("tau [nats]", "where the barrier starts; tokens above it are outlined"),
    ("D [nats]", "KL of the student to its reference, aggregated over a completion's tokens"),
    ("> tau [share]", "training tokens whose KL is above tau in the last epoch"),
    ("lam", "the barrier's weight in the loss"),
    ("on-axis shift kept", f"healed over steered on-axis shift; Q1 needs {KEEPS} or more"),
    ("intervals", "95 %: bootstrap over vignettes for shifts and coherence, Wilson for shares"),
)  # fmt: skip
"""What each number means and its unit."""


def tau_of(events: Sequence[Event], asked: float) -> float:
    """Where the barrier starts: of the last training, else as asked for."""
    healing = of_round(events, "healing")
    return float(healing[-1]["tau"]) if healing else asked


def _cleaned(value: Any) -> Any:
    """Every text on its way into the page; markup of our own stays as it is."""
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
    vectors: Figure | None = None,
) -> str:
    """The page of one run.

    Args:
        config, versions: as in the record's files.
        events, texts, processes: the lines of its journals.
        vectors: the cosines, see `vector_figure`; None where there is no vector yet.
    """
    tau = tau_of(events, config["loop"]["heal"]["tau"])
    table = rows(events)
    seen = instruments(events)
    return (
        environment()
        .get_template("report.html")
        .render(
            config=config,
            axis=axis,
            banner=banner(events, config["loop"]["rounds"]),
            cards=cards(events, texts, axis, EvalConfig(**config["loop"]["eval"])),
            columns=list(dict.fromkeys(key for line in table for key in line)),
            table=table,
            glossary=GLOSSARY,
            trajectory=page_charts.trajectory(events, axis),
            doses=page_doses.doses(events, texts, config["loop"]),
            ladders=page_doses.ladders(texts),
            foundations=page_charts.foundations(events, axis),
            spread=page_inside.token_kl(events, tau),
            heats=heats(events, tau),
            shades=HEAT,
            tau=tau,
            vectors=vectors,
            barrier=page_inside.barrier(events),
            healing={e["round"]: e for e in events if e["event"] == "healing"},
            stories=stories(texts),
            own=seen.pop("vignettes", None),
            instruments=seen,
            settings=list(flat(config)),
            versions=list(flat(versions)),
            cost=cost(events, processes),
        )
    )


def vector_figure(folder: Path, events: Sequence[Event]) -> Figure | None:
    """Cosines between the vectors of a run folder, or why they cannot be read."""
    try:
        vectors = [
            (
                e["round"],
                SteeringVector.load(folder / "rounds" / str(e["round"]) / "vector.safetensors"),
            )
            for e in events
            if e["event"] == "vector"
        ]
    except ShlError as error:
        return Figure("Cosine of each round's vector to the first and the last.", None, str(error))
    return page_inside.cosines(vectors) if vectors else None


def write_page(folder: Path) -> Path:
    """Write report.html into a run folder.

    Raises:
        ShlError: it is none, something in it was changed, or it cannot be written.
    """
    config, events, texts = read(folder)
    found = page(
        config,
        read_json(folder / "versions.json"),
        axis_of(folder),
        events,
        texts,
        read_lines(folder / "processes.jsonl"),
        vector_figure(folder, events),
    )
    write(folder / "report.html", found)
    return folder / "report.html"
