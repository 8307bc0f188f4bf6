"""The table at the end of a run, and the answers to the four questions, from its events alone."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from shl.axes import Axis
from shl.evaluation import selectivity

Event = Mapping[str, Any]

# Where a question turns from yes to no, each with its reason.
COHERENT = 0.97
"""Q2: a healed stage's share of base's survival and valid-answer mass; "a whisker"."""
RISES = 1.2
"""Q0: base perplexity at the top of the ladder over that at its foot; less is noise between
medians of eight texts."""
KEEPS = 0.5
"""Q1: share of the steered on-axis shift that healing must keep: most of it."""


def stages(events: Sequence[Event], name: str) -> list[Event]:
    """The stage events of one name, in order of the rounds."""
    return [e for e in events if e["event"] == "stage" and e["stage"] == name]


def of_round(events: Sequence[Event], name: str) -> list[Event]:
    """The last event of one name per round."""
    last = {e["round"]: e for e in events if e["event"] == name}
    return [last[k] for k in sorted(last)]


def on_axis(stage: Event, base: Event, axis: Axis) -> float:
    """Mean shift of the axis's foundations in the expected direction, nats."""
    shifts = [sign * (stage["nats"][f] - base["nats"][f]) for f, sign in axis.expected.items()]
    return sum(shifts) / len(shifts)


def rows(events: Sequence[Event]) -> list[dict[str, str]]:
    """The table: base, prompted, and steered and healed per round."""
    kept = {e["round"]: e for e in events if e["event"] == "round"}
    healing = {e["round"]: e for e in events if e["event"] == "healing"}
    table = []
    for e in events:
        if e["event"] != "stage":
            continue
        index, row = (
            e["round"],
            {"stage": e["stage"] if e["round"] < 0 else f"{e['stage']} {e['round']}"},
        )
        row |= {
            _column("care_nats", "care", events): f"{e['nats']['care']:.2f}",
            _column("auth_nats", "authority", events): f"{e['nats']['authority']:.2f}",
            "coherence": f"{e['coherence']:.2f}",
            "survival": f"{e['survival']:.2f}",
            "base ppl": "-" if e["perplexity"] is None else f"{e['perplexity']:.1f}",
        }
        if e["stage"] == "steered" and index in kept:
            row["kept/gen"] = f"{kept[index]['kept']}/{kept[index]['generated']}"
            row["kappa"] = f"{kept[index]['kappa']:.2f}"
        if e["stage"] == "healed" and index in healing:
            last = healing[index]["epochs"][-1]
            row["D"] = f"{last['d']:.2f}"
            row["> tau"] = f"{100 * last['tokens_over']:.0f} %"
            row["lam"] = f"{last['lam']:.1f}"
        table.append(row)
    return table


def _column(name: str, foundation: str, events: Sequence[Event]) -> str:
    """A column's name, with a warning where base's own reading of the foundation is noise."""
    base = stages(events, "base")
    return f"{name} (noise)" if base and foundation in base[0]["noise"] else name


def answers(events: Sequence[Event], texts: Sequence[Event], axis: Axis) -> dict[str, str]:
    """Q0 to Q3 in a sentence each, with the numbers that decide."""
    steered, healed = stages(events, "steered"), stages(events, "healed")
    stopped = [e["sentence"] for e in events if e["event"] == "starved"]
    ended = {"stopped early": stopped[0]} if stopped else {}
    if not healed:
        return {"Q0-Q3": "no round was finished, nothing can be answered."} | ended
    (base,) = stages(events, "base")
    return {
        "Q0 can we filter?": _filter(events, texts),
        "Q1 does healing heal?": _heals(base, steered, healed, axis),
        "Q2 coherent over the loop?": _coherent(base, healed),
        "Q3 one direction?": _direction(events, base, healed, axis),
        "can we read it?": _probe(base),
        "on the axis?": _selective(healed[-1], axis),
        "beyond prompting?": _prompting(events, base, healed, axis),
        "the dose": _dose(events),
        "the barrier": "; ".join(
            f"round {e['round']}: {e['barrier']} (last epoch D {e['epochs'][-1]['d']:.2f} at tau "
            f"{e['tau']:g}, lam {e['epochs'][-1]['lam']:.1f})"
            + ("" if e["moved"] else ", and the adapter did not move")
            for e in of_round(events, "healing")
        ),
    } | ended


def _dose(events: Sequence[Event]) -> str:
    return "; ".join(
        f"round {e['round']}: kappa {e['kappa']:.2f}{_floor(e)}, {e['kept']} of {e['generated']} "
        "completions kept"
        for e in of_round(events, "round")
    )


def _floor(e: Event) -> str:
    return " (the floor: no lower dose was left to step down to)" if e["at_floor"] else ""


def _probe(base: Event) -> str:
    noise = base["noise"]
    listed = f"{', '.join(noise)}: do not read these" if noise else "none"
    return (
        f"names the intended foundation of {base['accuracy']:.0%} of the vignettes on base (chance "
        f"14%); readings that are noise (at most twice chance): {listed}."
    )


def _filter(events: Sequence[Event], texts: Sequence[Event]) -> str:
    probes = [t for t in texts if t["stage"] == "probe" and t["round"] == 0]
    doses = sorted({t["dose"] for t in probes}, key=abs)
    if len(doses) < 2:
        return "not asked: the dose walk was off."
    groups = [[t for t in probes if t["dose"] == dose] for dose in doses]
    survival = [sum(not t["reasons"] for t in group) / len(group) for group in groups]
    middle = [sorted(map(_perplexity, group))[len(group) // 2] for group in groups]
    yes = survival[-1] < survival[0] and middle[-1] > RISES * middle[0]
    listed = ", ".join(
        f"{d:.2f}: {s:.0%} / {m:.1f}" for d, s, m in zip(doses, survival, middle, strict=True)
    )
    return f"{_say(yes)}; survival / median base perplexity by dose in round 0: {listed}."


def _heals(base: Event, steered: Sequence[Event], healed: Sequence[Event], axis: Axis) -> str:
    # Round 0 is the clean case: both start from base.
    s, h = steered[0], healed[0]
    before, after = on_axis(s, base, axis), on_axis(h, base, axis)
    share = after / before if before else float("nan")
    yes = (
        h["coherence"] > s["coherence"]
        and h["survival"] >= s["survival"]
        and before > 0
        and share >= KEEPS
    )
    return (
        f"{_say(yes)}; round 0, steered against healed: coherence {s['coherence']:.2f} to "
        f"{h['coherence']:.2f}, survival {s['survival']:.2f} to {h['survival']:.2f}, on-axis shift "
        f"{before:+.2f} to {after:+.2f} nats ({share:.0%} kept)."
    )


def _coherent(base: Event, healed: Sequence[Event]) -> str:
    mass = [h["coherence"] for h in healed]
    survival = [h["survival"] / base["survival"] if base["survival"] else 0.0 for h in healed]
    yes = min(mass) >= COHERENT and min(survival) >= COHERENT
    return (
        f"{_say(yes)}; per round, valid-answer mass over base {_list(mass)}, survival of free "
        f"samples over base {_list(survival)} (yes needs {COHERENT} in each)."
    )


def _direction(events: Sequence[Event], base: Event, healed: Sequence[Event], axis: Axis) -> str:
    shifts = [on_axis(h, base, axis) for h in healed]
    cosines = [
        sum(e["cosine_to_first"].values()) / len(e["cosine_to_first"])
        for e in of_round(events, "round")
    ]
    grows = all(b > a for a, b in zip([0.0, *shifts], shifts, strict=False))
    yes = grows and all(c > 0 for c in cosines)
    return (
        f"{_say(yes)}; on-axis shift per round {_list(shifts, '+.2f')} nats, mean cosine of each "
        f"round's vector to the first {_list(cosines)}."
    )


def _selective(last: Event, axis: Axis) -> str:
    on = ", ".join(
        f"{name} {last['shift'][name]:+.2f} ({low:+.2f} to {high:+.2f})"
        for name, (low, high) in ((n, last["shift_interval"][n]) for n in axis.expected)
    )
    others = [name for name in last["shift"] if name not in axis.expected]
    off = max(others, key=lambda n: abs(last["shift"][n]), default=None)
    if off is None:
        return f"not asked: the axis expects every foundation to move; {on}."
    ratio = selectivity(last["shift"], axis.expected)
    return (
        f"{_say(ratio > 1)}; last healed stage against base, nats and 95 % interval: {on}; largest "
        f"off-axis shift {off} {last['shift'][off]:+.2f}; selectivity {ratio:.2f} (yes needs 1)."
    )


def _prompting(events: Sequence[Event], base: Event, healed: Sequence[Event], axis: Axis) -> str:
    (plus,), (minus,) = stages(events, "prompted+"), stages(events, "prompted-")
    prompted = on_axis(plus, base, axis)
    contrast = on_axis(plus, minus, axis)
    reached = on_axis(healed[-1], base, axis)
    return (
        f"{_say(reached > prompted)}; on-axis shift of the last healed stage {reached:+.2f} nats, "
        f"of the prompted persona {prompted:+.2f} (against its opposite {contrast:+.2f}); "
        "coherence is not matched here."
    )


def _perplexity(text: Event) -> float:
    """An empty completion has none on record; it counts as the worst."""
    return math.inf if text["perplexity"] is None else float(text["perplexity"])


def _say(yes: bool) -> str:
    return "yes" if yes else "no"


def _list(values: Sequence[float], form: str = ".2f") -> str:
    return ", ".join(format(value, form) for value in values)
