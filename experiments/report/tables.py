"""Tables of a run, from its events and texts."""

import math
from collections.abc import Mapping, Sequence
from statistics import median_low

import numpy as np

from experiments.questions.estimates import Answer
from experiments.record.reader import Event, items_of, stages
from shl.measure.nulls import Nulls
from shl.measure.retention import Retention

ANSWER_COLUMNS = ("question", "answer", "deciding figure", "value", "interval", "threshold")
"""Columns of the table of answers."""

TRAINING = ("kept/gen", "kappa", "beta", "rho", "D", "> tau", "lam")
"""Columns of `rows` that describe the dose and the training."""


def answer_row(answer: Answer) -> tuple[str, ...]:
    """A question's row under `ANSWER_COLUMNS`; the last four are empty where no estimate decides.

    Example:
        >>> answer_row(Answer("Q0", "can we filter?", "info", "", {}))
        ('Q0: can we filter?', 'info', '', '', '', '')
    """
    name = f"{answer.key}: {answer.question}" if answer.key else answer.question
    decided = answer.deciding
    return (name, answer.verdict, *(decided.cells if decided else ("",) * 4))


def other_estimates(answer: Answer) -> list[tuple[str, ...]]:
    """Cells of the estimates that do not decide an answer, with the outcome and note of each."""
    others = [e for e in answer.estimates if e is not answer.deciding]
    return [(*e.cells, e.outcome, e.note if e.cells[1] else "") for e in others]


def rows(events: Sequence[Event]) -> list[dict[str, str]]:
    """A row per stage: base, prompted, and steered and healed per round."""
    kept = {e["round"]: e for e in events if e["event"] == "round"}
    healing = {e["round"]: e for e in events if e["event"] == "healing"}
    table = []
    for e in events:
        if e["event"] != "stage":
            continue
        index = e["round"]
        row = {
            "stage": e["stage"] if index < 0 else f"{e['stage']} {index}",
            _column("care_nats", "care", events): f"{e['nats']['care']:.2f}",
            _column("auth_nats", "authority", events): f"{e['nats']['authority']:.2f}",
            **_random(events, e, {"care": "random care", "authority": "random auth"}),
            **_items(events, e),
            "valid mass": f"{e['coherence']:.2f}",
            "survival": f"{e['survival']:.2f}",
            "base ppl": "-" if e["perplexity"] is None else f"{e['perplexity']:.1f}",
        }
        if e["stage"] == "steered" and index in kept:
            row["kept/gen"] = f"{kept[index]['kept']}/{kept[index]['generated']}"
            row["kappa"] = f"{kept[index]['kappa']:.2f}"
        if e["stage"] == "healed" and index in healing:
            last = healing[index]["epochs"][-1]
            row |= _retention(events, index)
            row["D"] = f"{last['d']:.2f}"
            row["> tau"] = f"{100 * last['tokens_over']:.0f} %"
            row["lam"] = f"{last['lam']:.1f}"
        table.append(row)
    return table


def tables(events: Sequence[Event]) -> dict[str, list[dict[str, str]]]:
    """`rows` as two tables by label: what was measured at each stage, and the dose and the training
    of those that have one; without rows there is no table."""
    table = rows(events)
    measured = [{k: v for k, v in row.items() if k not in TRAINING} for row in table]
    trained = [{k: row[k] for k in ("stage", *TRAINING) if k in row} for row in table]
    trained = [row for row in trained if len(row) > 1]
    found = {"readings of each stage": measured, "dose and training": trained}
    return {label: part for label, part in found.items() if part}


def _items(events: Sequence[Event], stage: Event) -> dict[str, str]:
    found = {"S / base": ("context", ".2f"), "cloze": ("cloze", "+.2f"), "KL": ("kl", ".2f")}
    read = {key: (items_of(events, name, stage), form) for key, (name, form) in found.items()}
    row = {key: format(e["value"], form) for key, (e, form) in read.items() if e is not None}
    first = {key: row[key] for key in ("cloze",) if key in row}
    return first | _random(events, stage, {"cloze": "random"}) | row


def _random(events: Sequence[Event], stage: Event, columns: Mapping[str, str]) -> dict[str, str]:
    """What random vectors of the stage's KL do, in the column of each instrument on record."""
    kl, row = items_of(events, "kl", stage), {}
    for e in events:
        if e["event"] == "nulls" and e["instrument"] in columns and kl is not None:
            table = Nulls(tuple(e["levels"]), np.array(e["values"]))
            moved = f"+-{table.interval(kl['value'])[1]:.2f}" if kl["value"] > 0 else ""
            row[columns[e["instrument"]]] = moved
    return row


def _retention(events: Sequence[Event], index: int) -> dict[str, str]:
    """The share and cosine over all sources of texts."""
    found = [e["sources"] for e in events if e["event"] == "retention" and e["round"] == index]
    if not found:
        return {}
    sources = found[0].values()
    sums = (tuple(s for x in sources for s in x[key]) for key in ("teacher", "both", "student"))
    whole = Retention(*sums)
    return {"beta": f"{whole.share:.2f}", "rho": f"{whole.cosine:.2f}"}


def _column(name: str, foundation: str, events: Sequence[Event]) -> str:
    """A column's name, with a warning where base's reading of the foundation is noise."""
    base = stages(events, "base")
    return f"{name} (noise)" if base and foundation in base[0]["noise"] else name


def nuisance_rows(events: Sequence[Event]) -> list[dict[str, str]]:
    """A row per round and nuisance direction: the vector's cosine to it at each layer, in brackets
    the bounds of its two nulls."""
    table = []
    for e in events:
        if e["event"] == "round":
            for name, layers in (e.get("nuisance") or {}).items():
                row = {layer: _cosine(c) for layer, c in layers.items()}
                table.append({"round": str(e["round"]), "direction": name, **row})
    return table


def _cosine(c: Event | None) -> str:
    if c is None or c["random"] is None or c["shuffled"] is None:
        return "-" if c is None else f"{c['value']:+.2f}"
    return f"{c['value']:+.2f} ({c['random']:.2f}, {c['shuffled']:.2f})"


def ladders(texts: Sequence[Event]) -> dict[int, list[dict[str, float]]]:
    """Per round and probed dose: texts generated and kept, and their median perplexity under base
    (infinite where the median text is empty)."""
    groups: dict[int, dict[float, list[Event]]] = {}
    for t in texts:
        if t["stage"] == "probe":
            groups.setdefault(t["round"], {}).setdefault(t["dose"], []).append(t)
    return {
        index: [
            {
                "dose": dose,
                "generated": len(found),
                "kept": sum(not t["reasons"] for t in found),
                "perplexity": median_low(
                    math.inf if t["perplexity"] is None else t["perplexity"] for t in found
                ),
            }
            for dose, found in sorted(doses.items(), key=lambda item: abs(item[0]))
        ]
        for index, doses in groups.items()
    }


def cells(table: Sequence[Mapping[str, str]]) -> tuple[list[str], list[list[str]]]:
    """The keys of all rows in the order in which they appear, and each row's cells under them; a
    missing key is an empty cell."""
    names = list(dict.fromkeys(key for row in table for key in row))
    return names, [[row.get(name, "") for name in names] for row in table]


def markdown(table: Sequence[Mapping[str, str]]) -> str:
    """Rows as a Markdown table."""
    names, lines = cells(table)
    head, *body = (f"| {' | '.join(line)} |\n" for line in (names, *lines))
    return "".join([head, "|" + "---|" * len(names) + "\n", *body])
