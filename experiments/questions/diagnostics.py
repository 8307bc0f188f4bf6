"""What training and the dose walk did: told, and whether the barrier ever fired."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from experiments.questions.estimates import Answer, Verdict, number
from experiments.questions.measurements import Measured
from experiments.record.reader import Event, of_round

SHOWN = 5
"""Tokens that a sentence names; the figures hold all."""


def barrier(m: Measured) -> Answer:
    """Did the barrier ever fire, and on which tokens?"""
    key, question = "barrier", "did the barrier fire?"
    healing = of_round(m.events, "healing")
    if not healing:
        return Answer(key, question, "undecided", "Undecided. Nothing was healed.", {})
    found = [_training(e) for e in healing]
    verdict: Verdict = "yes" if any(r["steps_fired"] for r in found) else "no"
    parts = [
        f"round {r['round']}: {r['barrier']} (fired in {r['steps_fired']} of {r['steps']} steps, "
        f"last epoch D {number(r['d'])} at tau {r['tau']:g}, {r['tokens_over']:.0%} of tokens "
        f"over it, lam {number(r['lam'])})"
        for r in found
    ]
    curves = _curves(m.events, {r["round"]: r["tau"] for r in found})
    for kind in dict.fromkeys(curve["verdict"] for curve in curves):
        group = [curve for curve in curves if curve["verdict"] == kind]
        over, length = (sum(curve[key] for curve in group) for key in ("over", "length"))
        named = ", ".join(_named(group)[:SHOWN])
        parts.append(
            f"{kind} text on record: {over} of {length} tokens over tau"
            + (f", highest {named} nats" if named else "")
        )
    figures = {"rounds": found, "texts": curves}
    every = ". ".join(part[0].upper() + part[1:] for part in (verdict, *parts))
    return Answer(key, question, verdict, f"{every}.", figures)


def _named(curves: Sequence[dict[str, Any]]) -> list[str]:
    """The pieces above tau in these texts, highest first, with their count."""
    every = [t for curve in curves for t in curve["tokens"]]
    count: dict[str, int] = defaultdict(int)
    highest: dict[str, float] = defaultdict(float)
    for t in every:
        count[t["piece"]] += t["count"]
        highest[t["piece"]] = max(highest[t["piece"]], t["kl"])
    return [
        f"{piece!r} {number(highest[piece])}" + (f" x{count[piece]}" if count[piece] > 1 else "")
        for piece in sorted(highest, key=lambda piece: -highest[piece])
    ]


def _training(e: Event) -> dict[str, Any]:
    last = e["epochs"][-1]
    return {
        "round": e["round"],
        "barrier": e["barrier"],
        "tau": e["tau"],
        "steps": len(e["steps"]),
        "steps_fired": sum(step["fired"] > 0 for step in e["steps"]),
        **{name: last[name] for name in ("d", "tokens_over", "lam")},
    }


def _curves(events: Sequence[Event], taus: dict[int, float]) -> list[dict[str, Any]]:
    """Per text on record, its tokens above tau: each piece with its count and highest KL."""
    found = []
    for event in of_round(events, "token_kl"):
        tau = taus.get(event["round"])
        if tau is None:
            continue
        for curve in event["curves"]:
            above: dict[str, list[float]] = defaultdict(list)
            for piece, kl in zip(curve["pieces"], curve["kl"], strict=True):
                if kl > tau:
                    above[piece].append(kl)
            order = sorted(above, key=lambda piece: -max(above[piece]))
            tokens = [{"piece": p, "count": len(above[p]), "kl": max(above[p])} for p in order]
            found.append(
                {
                    "round": event["round"],
                    "verdict": curve["verdict"],
                    "tau": tau,
                    "length": len(curve["kl"]),
                    "over": sum(map(len, above.values())),
                    "tokens": tokens,
                }
            )
    return found


def dose(m: Measured) -> Answer:
    """The dose that each round settled on."""
    found = [
        {name: e[name] for name in ("round", "kappa", "dose", "kept", "generated", "at_floor")}
        for e in of_round(m.events, "round")
    ]
    said = "; ".join(
        f"round {e['round']}: kappa {e['kappa']:.2f}{_floor(e)}, {e['kept']} of {e['generated']} "
        "completions kept"
        for e in found
    )
    return _told("dose", "which dose?", said or "no round was finished", {"rounds": found})


def _floor(e: dict[str, Any]) -> str:
    return " (the floor: no lower dose was left to step down to)" if e["at_floor"] else ""


def moved(m: Measured) -> Answer:
    """Which rounds trained an adapter that is no longer the identity."""
    found = {e["round"]: e["moved"] for e in of_round(m.events, "healing")}
    still = [str(index) for index, moving in found.items() if not moving]
    if not found:
        said = "nothing was healed"
    elif still:
        said = f"the adapter did not move in round {', '.join(still)}"
    else:
        said = "every adapter moved"
    return _told(
        "moved", "did the adapters move?", said, {"rounds": {str(k): v for k, v in found.items()}}
    )


def ended(m: Measured) -> Answer:
    """Whether all rounds were done, and if not, why."""
    early = [e["sentence"] for e in m.events if e["event"] == "starved"]
    done = any(e["event"] == "end" for e in m.events)
    count = len(of_round(m.events, "round"))
    if early:
        said = f"stopped early, {early[0]}"
    else:
        said = f"{count} rounds, all done" if done else f"not yet, {count} rounds so far"
    return _told("ended", "did it finish?", said, {"rounds": count, "done": done, "starved": early})


def _told(key: str, question: str, said: str, figures: dict[str, Any]) -> Answer:
    return Answer(key, question, "told", f"{said[0].upper()}{said[1:].rstrip('.')}.", figures)
