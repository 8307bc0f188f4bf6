"""What the arms came to, in a table and in sentences."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.arms.catalogue import ARMS
from experiments.arms.compare import LEVELS, Found, against, table
from experiments.arms.text_kl import HOWS, KINDS

RIVALS = ("persona", "prompted", "steered", "none", "mean", "p95", "random", "unsteered")
"""What the method is held against, the one that matters most first."""


def verdicts(found: Found) -> list[dict[str, Any]]:
    """The method against each rival that was run, at the strictest level and at a loose one."""
    return [
        against(found, "rmse", rival, level)
        for rival in RIVALS
        if rival in found
        for level in ((LEVELS[0],) if rival == "persona" else (LEVELS[0], LEVELS[2]))
    ]


def question(verdict: Mapping[str, Any]) -> str:
    """What is asked of the method and a rival.

    Example:
        >>> question(dict(rival="none", level=0.9))
        'further than none at coherence 0.9?'
    """
    if verdict["rival"] == "persona":
        return "further than prompting at its own coherence?"
    return f"further than {verdict['rival']} at coherence {verdict['level']:g}?"


def sentence(verdict: Mapping[str, Any]) -> str:
    """A verdict with what decides it.

    Example:
        >>> sentence(dict(verdict="undecided", each=[0.5], mean=0.5, interval=None))
        'undecided; +0.50 nats (one seed, no interval).'
    """
    if not verdict["each"]:
        return "not asked: no seed has both."
    if verdict["interval"] is None:
        return f"{verdict['verdict']}; {verdict['mean']:+.2f} nats (one seed, no interval)."
    low, high = verdict["interval"]
    return (
        f"{verdict['verdict']}; {verdict['mean']:+.2f} nats ({100 * verdict['confidence']:g} % "
        f"{low:+.2f} to {high:+.2f}, "
        f"{len(verdict['each'])} seeds)."
    )


def columns(found: Found) -> list[dict[str, str]]:
    """The table as text: means over seeds, with their range where there is more than one."""
    base = {"arm": "base", "trait at the end": "0.00", "mass": "1.00", "survival": "1.00"}
    return [base] + [
        {
            "arm": row["arm"],
            "seeds": str(len(row["seeds"])),
            "trait at the end": _cell(row["trait"], "+.2f"),
            "mass": _cell(row["mass"], ".2f"),
            "survival": _cell(row["survival"], ".2f"),
        }
        | {
            f"trait at {level:g}": _cell(row["reach"][f"{level:g}"], "+.2f")
            for level in LEVELS
            if "reach" in row
        }
        for row in table(found)
    ]


def _cell(number: Mapping[str, Any], form: str) -> str:
    each = number["each"]
    text = format(number["mean"], form)
    if len(each) > 1:
        text += f" ({format(min(each), form)} to {format(max(each), form)})"
    return text


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A table of dicts, in the order in which their keys come up."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(row.get(name, "") for name in names) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def kinds_words(summary: Mapping[str, Any]) -> list[str]:
    """The three kinds of text in sentences."""
    lines = []
    for kind in KINDS:
        if not summary["texts"][kind]:
            lines.append(f"{kind}: no text of this kind.")
            continue
        middle = ", ".join(f"{how} {summary['medians'][kind][how]:.2f}" for how in HOWS)
        lines.append(
            f"{kind}: {summary['texts'][kind]} texts, median per-token KL {middle} nats, rmse over "
            f"mean {summary['spiky'][kind]:.2f}."
        )
    for pair, by_how in summary["auc"].items():
        if None not in by_how.values():
            told = ", ".join(f"{how} {value:.2f}" for how, value in by_how.items())
            lines.append(f"chance that {pair}: {told}.")
    return lines


def legend() -> str:
    """What each arm asks, a line each."""
    return "".join(f"- **{arm.name}**: {arm.asks}\n" for arm in ARMS.values())
