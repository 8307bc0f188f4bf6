"""The coherence filter: text rules and perplexity bounds, with every reason for dropping a text.

Every rule that fires is recorded, not only the first. Perplexity is that of the untouched model
given the prompt, on the whole completion and on its last quarter, where collapse sits.
"""

import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformer_lens import HookedTransformer

from shl.config import FilterConfig
from shl.models.generate import Completion
from shl.models.scores import base_perplexities

RULES = (
    "too_short",
    "incoherent",
    "too_predictable",
    "word_loop",
    "char_loop",
    "compressible",
    "few_words",
    "soup",
    "markup",
    "narrating",
    "boilerplate",
    "persona_echo",
)
"""Every reason that `judge` can give."""

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*|\d+")
_VOWEL = re.compile(r"[aeiouyáéíóúàèùäöüâêîôûåæø]", re.IGNORECASE)
_MARKUP = re.compile(r"</?\w+[^<>]{0,40}>|<\w*_\w*>|\[multimodal\]")
_NARRATING = re.compile(
    r"\bI(?:'m| am|’m) (?:someone|somebody|an? (?:\w+ )?(?:person|man|woman|individual|human)"
    r"|the (?:kind|sort|type) of \w+|one of those \w+)\b[^.!?]{0,40}\b(?:who|that|whose)\b"
    r"|\bas (?:someone|somebody|a person|an individual) who\b"
    r"|\bmy (?:persona|personality|character) (?:is|trait)",
    re.IGNORECASE,
)
_BOILERPLATE = re.compile(
    r"\bas an? (?:AI|artificial intelligence|(?:large )?language model|virtual assistant)\b"
    r"|\bI(?:'m| am|’m) (?:just )?an? (?:AI|artificial intelligence|language model|chatbot)\b"
    r"|\bI (?:can ?not|can't|can’t|am (?:not able|unable) to) "
    r"(?:assist|comply|fulfil|provide|help (?:you )?with)\b"
    r"|\bI(?:'m| am|’m) sorry,? but I\b"
    r"|\bI (?:do not|don't|don’t) have (?:personal|feelings|emotions)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Verdict:
    """A completion with every reason to drop it (none: it is kept) and its base perplexities."""

    completion: Completion
    reasons: tuple[str, ...]
    perplexity: float
    tail_perplexity: float

    @property
    def kept(self) -> bool:
        """Whether no rule fired."""
        return not self.reasons


def words_of(text: str) -> list[str]:
    """Words of a text, lower case; numbers count as words.

    Example:
        >>> words_of("Don't go at 10!")
        ["don't", 'go', 'at', '10']
    """
    return [word.lower() for word in _WORD.findall(text)]


def ngram_share(items: Sequence[str], sizes: Sequence[int]) -> float:
    """Share of a sequence that its most frequent n-gram covers, the largest over `sizes`.

    Only n-grams that occur at least three times count; overlapping occurrences cover what they
    cover once.

    Example:
        >>> ngram_share("a b a b a b c d".split(), [2])
        0.75
    """
    worst = 0.0
    for n in sizes:
        grams = Counter(tuple(items[i : i + n]) for i in range(len(items) - n + 1))
        for gram, count in grams.most_common(3):
            if count < 3:
                break
            covered = [False] * len(items)
            for i in range(len(items) - n + 1):
                if tuple(items[i : i + n]) == gram:
                    covered[i : i + n] = [True] * n
            worst = max(worst, sum(covered) / len(items))
    return worst


def longest_run(items: Sequence[str]) -> int:
    """Length of the longest run of one and the same item.

    Example:
        >>> longest_run("very very very good".split())
        3
    """
    best = run = 0
    for i, item in enumerate(items):
        run = run + 1 if i and items[i - 1] == item else 1
        best = max(best, run)
    return best


def compression(text: str) -> float:
    """Compressed size over raw size (deflate at level 9, without a frame).

    Example:
        >>> compression("ab" * 200) < 0.1
        True
    """
    raw = text.encode()
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    return len(deflate.compress(raw) + deflate.flush()) / max(len(raw), 1)


def looks_real(word: str) -> bool:
    """Whether a word (as written) looks like one: a vowel, not much too long, no capitals inside.

    Example:
        >>> [looks_real(word) for word in ("hello", "BUILDUTE", "itlikethatIwouldn'tdoit", "I")]
        [True, False, False, True]
    """
    if word.isdigit():
        return True
    inner_capital = any(c.isupper() for c in word[1:]) and len(word) > 4
    return len(word) <= 18 and not inner_capital and bool(_VOWEL.search(word))


def text_reasons(text: str, config: FilterConfig, persona: str | None = None) -> list[str]:
    """The reasons that need no model, in the order of `RULES`.

    Args:
        text: a completion.
        persona: the sentence that the model may have been given, whose echo is narration.
    """
    written = _WORD.findall(text)
    words = words_of(text)
    # One letter in three standing outside words (markup, glyphs, digits) is no prose either.
    letters = sum(c.isalpha() or c.isspace() for c in text) / max(len(text), 1)
    rules: dict[str, Callable[[], bool]] = {
        "too_short": lambda: len(words) < config.min_words,
        "word_loop": lambda: (
            ngram_share(words, (2, 3, 4)) > config.max_word_share
            or longest_run(words) > config.max_run
            or _top_share(words) > config.max_word_share
        ),
        "char_loop": lambda: (
            ngram_share(text, range(3, 13)) > config.max_char_share
            or longest_run(re.sub(r"\s", "", text)) > 5
        ),
        "compressible": lambda: len(text) >= 100 and compression(text) < config.min_compression,
        "few_words": lambda: (
            bool(words) and len(set(words)) / len(words) < config.min_distinct_words
        ),
        "soup": lambda: (
            not written
            or sum(map(looks_real, written)) / len(written) < config.min_real_words
            or letters < config.min_real_words
        ),
        "markup": lambda: bool(_MARKUP.search(text)),
        "narrating": lambda: bool(_NARRATING.search(text)),
        "boilerplate": lambda: bool(_BOILERPLATE.search(text)),
        "persona_echo": lambda: persona is not None and _echoes(words, words_of(persona)),
    }
    return [name for name in RULES if name in rules and rules[name]()]


def _top_share(words: Sequence[str]) -> float:
    """Share of the most frequent word of four letters or more (function words may recur)."""
    long = [word for word in words if len(word) > 3]
    return max(Counter(long).values()) / len(words) if len(long) > 3 else 0.0


def _echoes(words: Sequence[str], persona: Sequence[str]) -> bool:
    spans = {tuple(persona[i : i + 5]) for i in range(len(persona) - 4)}
    return any(tuple(words[i : i + 5]) in spans for i in range(len(words) - 4))


def judge(
    model: HookedTransformer,
    completions: Sequence[Completion],
    config: FilterConfig | None = None,
    *,
    persona: str | None = None,
) -> list[Verdict]:
    """Every completion with all reasons to drop it, in order.

    Args:
        persona: what the prompts carried, so that repeating it counts as narrating.

    Raises:
        ShlError: a completion whose NLL under base is not finite.

    Example:
        >>> from shl.models.generate import generate
        >>> from shl.models.tiny import tiny_gemma
        >>> model = tiny_gemma()
        >>> "soup" in judge(model, generate(model, ["Hello?"]))[0].reasons
        True
    """
    config = config or FilterConfig()
    scores = base_perplexities(model, completions, batch_size=config.batch_size)
    verdicts = []
    for completion, (whole, tail) in zip(completions, scores, strict=True):
        reasons = text_reasons(completion.text, config, persona)
        if tail > config.max_tail_perplexity:
            reasons.append("incoherent")
        if min(whole, tail) < config.min_perplexity:
            reasons.append("too_predictable")
        ordered = tuple(sorted(reasons, key=RULES.index))
        verdicts.append(Verdict(completion, ordered, whole, tail))
    return verdicts


def keep_coherent(
    model: HookedTransformer,
    completions: Sequence[Completion],
    config: FilterConfig | None = None,
) -> list[Completion]:
    """The completions that no rule drops, in order.

    Raises:
        ShlError: a completion whose NLL under base is not finite.

    Example:
        >>> from shl.models.generate import generate
        >>> from shl.models.tiny import tiny_gemma
        >>> model = tiny_gemma()
        >>> keep_coherent(model, generate(model, ["Hello?"]))  # noise is all it says
        []
    """
    return [v.completion for v in judge(model, completions, config) if v.kept]
