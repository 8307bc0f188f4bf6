"""Results of the arms, as a table and in sentences."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.arms.catalogue import Arm
from experiments.arms.compare import LEVELS, Found, against, table
from experiments.arms.text_kl import GROUPS, HOWS
from shl.config import EvalConfig

RIVALS = (
    "persona",
    "prompted",
    "both",
    "online",
    "online-reward",
    "steered",
    "none",
    "mean",
    "p95",
    "random",
    "unsteered",
)
"""What the method is compared with, the most important first."""


def verdicts(found: Found) -> list[dict[str, Any]]:
    """The method against each rival that was run, at the strictest level and at a loose one."""
    return [
        against(found, "rmse", rival, level)
        for rival in RIVALS
        if rival in found
        for level in ((LEVELS[0],) if rival == "persona" else (LEVELS[0], LEVELS[2]))
    ]


def question(verdict: Mapping[str, Any]) -> str:
    """The question that compares the method with a rival.

    Example:
        >>> question(dict(rival="none", level=0.9))
        'further than none at coherence 0.9?'
    """
    if verdict["rival"] == "persona":
        return "further than prompting at its own coherence?"
    return f"further than {verdict['rival']} at coherence {verdict['level']:g}?"


def sentence(verdict: Mapping[str, Any]) -> str:
    """A verdict with the difference that decides it.

    Example:
        >>> sentence(dict(verdict="undecided", each=[0.5], mean=0.5, interval=None))
        'undecided; +0.50 nats (one seed, no interval).'
    """
    if not verdict["each"]:
        return "not compared: no seed has both."
    if verdict["interval"] is None:
        return f"{verdict['verdict']}; {verdict['mean']:+.2f} nats (one seed, no interval)."
    low, high = verdict["interval"]
    level = 100 * verdict.get("confidence", EvalConfig().confidence)
    return (
        f"{verdict['verdict']}; {verdict['mean']:+.2f} nats ({level:g} % {low:+.2f} to "
        f"{high:+.2f}, {len(verdict['each'])} seeds)."
    )


def columns(found: Found) -> list[dict[str, str]]:
    """The table as text: means over seeds, with their range where there is more than one."""
    base = {"arm": "base", "trait at the end": "0.00", "S / base": "1.00", "survival": "1.00"}
    return [base] + [
        {
            "arm": row["arm"],
            "seeds": str(len(row["seeds"])),
            "trait at the end": _cell(row["trait"], "+.2f"),
            "S / base": _cell(row["context"], ".2f"),
            "survival": _cell(row["survival"], ".2f"),
            "training [CPU s]": _cell(row["cpu"], ".0f") if "cpu" in row else "",
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


def text_kl_sentences(summary: Mapping[str, Any]) -> list[str]:
    """The per-token KL of each group of text, and how well it separates the groups."""
    lines = []
    for group in GROUPS:
        if not summary["texts"][group]:
            lines.append(f"{group}: no text of this group.")
            continue
        middle = ", ".join(f"{how} {summary['medians'][group][how]:.2f}" for how in HOWS)
        lines.append(
            f"{group}: {summary['texts'][group]} texts, median per-token KL {middle} nats, rmse "
            f"over mean {summary['spiky'][group]:.2f}."
        )
    for pair, by_how in summary["auc"].items():
        if None not in by_how.values():
            values = ", ".join(f"{how} {value:.2f}" for how, value in by_how.items())
            lines.append(f"chance that {pair}: {values}.")
    return lines


def legend(arms: Sequence[Arm]) -> str:
    """The question of each arm, one per line."""
    return "".join(f"- **{arm.name}**: {arm.question}\n" for arm in arms)
