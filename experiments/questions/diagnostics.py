"""Diagnostics of training and of the dose walk; only the barrier's is a yes or no."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from experiments.questions.estimates import Answer, Outcome, number, paragraph
from experiments.questions.measurements import NO_ROUND, Measurements
from experiments.record.reader import Event, of_round

LISTED = 5
"""Tokens that a sentence lists; the figures hold all."""


def barrier(m: Measurements) -> Answer:
    """Did the barrier ever fire, and on which tokens?"""
    key, question = "barrier", "did the barrier fire?"
    healing = of_round(m.events, "healing")
    if not healing:
        return Answer(key, question, "undecided", "Undecided. Nothing was healed.", {})
    rounds: list[dict[str, Any]] = [
        {
            **{name: e[name] for name in ("round", "barrier", "tau")},
            "steps": len(e["steps"]),
            "steps_fired": sum(step["fired"] > 0 for step in e["steps"]),
            **{name: e["epochs"][-1][name] for name in ("d", "tokens_over", "lam")},
        }
        for e in healing
    ]
    parts = [
        f"round {r['round']}: {r['barrier']} (fired in {r['steps_fired']} of {r['steps']} steps, "
        f"last epoch D {number(r['d'])} at tau {r['tau']:g}, {r['tokens_over']:.0%} of tokens "
        f"above it, lam {number(r['lam'])})"
        for r in rounds
    ]
    texts = _texts(m.events, {r["round"]: r["tau"] for r in rounds})
    for t in texts:
        listed = ", ".join(
            f"{token['piece']!r} {number(token['kl'])}"
            + (f" x{token['count']}" if token["count"] > 1 else "")
            for token in t["tokens"][:LISTED]
        )
        parts.append(
            f"{t['verdict']} text on record: {t['over']} of {t['length']} tokens above tau"
            + (f", highest {listed} nats" if listed else "")
        )
    verdict: Outcome = "yes" if any(r["steps_fired"] for r in rounds) else "no"
    text = paragraph([verdict, *parts])
    return Answer(key, question, verdict, text, {"rounds": rounds, "texts": texts})


def _texts(events: Sequence[Event], taus: dict[int, float]) -> list[dict[str, Any]]:
    """Per kind of text on record, its tokens above tau: each with its count and highest KL."""
    length: dict[str, int] = defaultdict(int)
    above: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for event in (e for e in of_round(events, "token_kl") if e["round"] in taus):
        for curve in event["curves"]:
            length[curve["verdict"]] += len(curve["kl"])
            for piece, kl in zip(curve["pieces"], curve["kl"], strict=True):
                if kl > taus[event["round"]]:
                    above[curve["verdict"]][piece].append(kl)
    found = []
    for verdict, count in length.items():
        over = sum(map(len, above[verdict].values()))
        pieces = sorted(above[verdict].items(), key=lambda item: -max(item[1]))
        tokens = [{"piece": p, "count": len(kl), "kl": max(kl)} for p, kl in pieces]
        found.append({"verdict": verdict, "length": count, "over": over, "tokens": tokens})
    return found


def dose(m: Measurements) -> Answer:
    """The dose that each round settled on."""
    names = ("round", "kappa", "dose", "kept", "generated", "at_floor")
    rounds = [{name: e[name] for name in names} for e in of_round(m.events, "round")]
    text = "; ".join(
        f"round {e['round']}: kappa {e['kappa']:.2f}{' (the lowest)' if e['at_floor'] else ''}, "
        # Online training keeps none.
        + (f"{e['kept']} of {e['generated']} completions kept" if e["kept"] else "on-policy")
        for e in rounds
    )
    return _info("dose", "which dose?", text or NO_ROUND, {"rounds": rounds})


def moved(m: Measurements) -> Answer:
    """Which rounds trained an adapter that is no longer the identity."""
    rounds = {str(e["round"]): e["moved"] for e in of_round(m.events, "healing")}
    still = [index for index, moving in rounds.items() if not moving]
    text = "every adapter moved" if rounds else "nothing was healed"
    if still:
        text = f"the adapter did not move in round {', '.join(still)}"
    return _info("moved", "did the adapters move?", text, {"rounds": rounds})


def ended(m: Measurements) -> Answer:
    """Whether all rounds were done, and if not, why."""
    starved = [e["sentence"] for e in m.events if e["event"] == "starved"]
    done = any(e["event"] == "end" for e in m.events)
    count = len(of_round(m.events, "round"))
    text = f"{count} rounds, all done" if done else f"not yet, {count} rounds so far"
    if starved:
        text = f"stopped early, {starved[0]}"
    figures = {"rounds": count, "done": done, "starved": starved}
    return _info("ended", "did it finish?", text, figures)


def _info(key: str, question: str, text: str, figures: dict[str, Any]) -> Answer:
    return Answer(key, question, "info", paragraph([text]), figures)
