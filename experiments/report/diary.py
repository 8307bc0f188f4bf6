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
        own = [t for t in texts if t["round"] == index]
        steered = [t for stage in ("batch", "probe") for t in own if t["stage"] == stage]
        listed: set[str] = set()
        for t in steered:
            prompt = t["prompt"]
            if prompt in listed or (index, prompt) not in healed:
                continue
            listed.add(prompt)
            verdict = ", ".join(t["reasons"]) or "kept"
            lines += [
                f"### Prompt {len(listed)}",
                _fenced(prompt),
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
    return "(no answer)" if t is None else _fenced(t["text"])


def _fenced(text: str) -> str:
    """Text in a code fence longer than any in it, so that nothing in it is markup."""
    fence = "`" * 3
    while fence in text:
        fence += "`"
    return f"\n\n{fence}text\n{text.strip()}\n{fence}"
