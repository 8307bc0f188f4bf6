"""The diary: what the steered model dreamt and what the healed one says by day, same prompt."""

from collections.abc import Sequence

from experiments.record.reader import Event


def diary(texts: Sequence[Event], per_round: int = 3) -> str:
    """Markdown, from texts.jsonl: per round, the first prompts that both stages answered."""
    lines = ["# Diary", ""]
    by_day = {(t["round"], t["prompt"]): t for t in texts if t["stage"] == "healed"}
    base = {t["prompt"]: t for t in texts if t["stage"] == "base"}
    # Of the texts, not of the settings: those may ask for any number of rounds.
    for index in sorted({t["round"] for t in texts if t["round"] >= 0}):
        lines += [f"## Round {index}", ""]
        dreamt = [t for t in texts if t["round"] == index and t["stage"] == "batch"]
        shown: set[str] = set()
        for t in dreamt:
            prompt = t["prompt"]
            if prompt in shown or (index, prompt) not in by_day:
                continue
            shown.add(prompt)
            verdict = ", ".join(t["reasons"]) or "kept"
            lines += [
                f"### {prompt}",
                "",
                f"**base** {_quote(base.get(prompt))}",
                "",
                f"**dreamt** (dose {t['dose']:.2f}, {verdict}) {_quote(t)}",
                "",
                f"**by day** {_quote(by_day[index, prompt])}",
                "",
            ]
            if len(shown) == per_round:
                break
    return "\n".join(lines)


def _quote(t: Event | None) -> str:
    """A model's text in a code fence of its own, so that nothing in it is markup."""
    if t is None:
        return "(no answer)"
    fence = "`" * 3
    while fence in t["text"]:
        fence += "`"
    return f"\n\n{fence}text\n{t['text'].strip()}\n{fence}"
