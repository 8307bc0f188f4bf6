"""The diary: texts of base, the steered model and its healed student to the same prompts."""

from collections.abc import Sequence

from experiments.record.reader import Event


def diary(texts: Sequence[Event], per_round: int = 3) -> str:
    """Markdown of texts.jsonl: per round, the first prompts that both stages answered."""
    lines = ["# Diary", ""]
    healed = {(t["round"], t["prompt"]): t for t in texts if t["stage"] == "healed"}
    base = {t["prompt"]: t for t in texts if t["stage"] == "base"}
    for index in sorted({t["round"] for t in texts if t["round"] >= 0}):
        lines += [f"## Round {index}", ""]
        steered = [t for t in texts if t["round"] == index and t["stage"] == "batch"]
        listed: set[str] = set()
        for t in steered:
            prompt = t["prompt"]
            if prompt in listed or (index, prompt) not in healed:
                continue
            listed.add(prompt)
            verdict = ", ".join(t["reasons"]) or "kept"
            lines += [
                f"### {prompt}",
                "",
                f"**base** {_quote(base.get(prompt))}",
                "",
                f"**steered** (dose {t['dose']:.2f}, {verdict}) {_quote(t)}",
                "",
                f"**healed** {_quote(healed[index, prompt])}",
                "",
            ]
            if len(listed) == per_round:
                break
    return "\n".join(lines)


def _quote(t: Event | None) -> str:
    """A model's text in a code fence longer than any in it, so that nothing in it is markup."""
    if t is None:
        return "(no answer)"
    fence = "`" * 3
    while fence in t["text"]:
        fence += "`"
    return f"\n\n{fence}text\n{t['text'].strip()}\n{fence}"
