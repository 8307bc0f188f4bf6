"""What the report says in words and tables, from a run's events and texts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.answers import answer_all
from experiments.checks import name_of
from experiments.status import remains
from experiments.summary import Event, of_round
from experiments.thresholds import COHERENT, KEEPS, RISES
from shl.axes import Axis
from shl.config import EvalConfig
from shl.errors import check

MARKS = {"yes": "\u2713", "no": "\u2717", "undecided": "?", "told": "\u00b7"}


@dataclass(frozen=True)
class Card:
    """One question and its answer; `told` are figures without a yes or no."""

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
        f"{remains(name, last['round'], rounds)}. The page shows what there is."
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
        check(
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
