"""The coherence filter: text rules and perplexity bounds, with every reason for dropping a text.

Perplexity is that of the base model given the prompt, on the whole completion and on its last
quarter, where text collapses first.
"""

import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

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
    """A completion with every rule that fired on it and its base perplexities."""

    completion: Completion
    reasons: tuple[str, ...]
    perplexity: float
    tail_perplexity: float

    @property
    def kept(self) -> bool:
        """Whether no rule fired."""
        return not self.reasons


def words_of(text: str) -> list[str]:
    """Words and numbers of a text, in lower case.

    Example:
        >>> words_of("Don't go at 10!")
        ["don't", 'go', 'at', '10']
    """
    return [word.lower() for word in _WORD.findall(text)]


def ngram_share(items: Sequence[str], sizes: Sequence[int]) -> float:
    """Largest share of a sequence that one n-gram covers, over `sizes`.

    Only the three most frequent n-grams of a size count, and only if they occur at least three
    times. Items in overlapping occurrences are counted once.

    Example:
        >>> ngram_share("a b a b a b c d".split(), [2])
        0.75
    """
    largest = 0.0
    for n in sizes:
        grams = [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]
        for gram, count in Counter(grams).most_common(3):
            if count >= 3:
                starts = [i for i, other in enumerate(grams) if other == gram]
                covered = {i + j for i in starts for j in range(n)}
                largest = max(largest, len(covered) / len(items))
    return largest


def longest_run(items: Sequence[str]) -> int:
    """Length of the longest run of equal items.

    Example:
        >>> longest_run("very very very good".split())
        3
    """
    return max((len(list(run)) for _, run in groupby(items)), default=0)


def compression(text: str) -> float:
    """Ratio of compressed to raw size (raw deflate stream, level 9).

    Example:
        >>> compression("ab" * 200) < 0.1
        True
    """
    raw = text.encode()
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    return len(deflate.compress(raw) + deflate.flush()) / max(len(raw), 1)


def looks_real(word: str) -> bool:
    """Whether a word as written is a number, or has a vowel, at most 18 characters and, if longer
    than 4 characters, no capitals inside.

    Example:
        >>> [looks_real(word) for word in ("hello", "BUILDUTE", "itlikethatIwouldn'tdoit", "I")]
        [True, False, False, True]
    """
    inner_capital = any(c.isupper() for c in word[1:]) and len(word) > 4
    return word.isdigit() or (len(word) <= 18 and not inner_capital and bool(_VOWEL.search(word)))


def text_reasons(text: str, config: FilterConfig, persona: str | None = None) -> list[str]:
    """The rules without a model that fire on a text, in the order of `RULES`.

    Args:
        persona: the persona in the prompt, which the text must not repeat.
    """
    written = _WORD.findall(text)
    words = words_of(text)
    # Text with too many characters outside words (markup, glyphs, digits) is not prose either.
    letters = sum(c.isalpha() or c.isspace() for c in text) / max(len(text), 1)
    fired = {
        "too_short": len(words) < config.min_words,
        "word_loop": ngram_share(words, (2, 3, 4)) > config.max_word_share
        or longest_run(words) > config.max_run
        or _top_share(words) > config.max_word_share,
        "char_loop": ngram_share(text, range(3, 13)) > config.max_char_share
        or longest_run(re.sub(r"\s", "", text)) > 5,
        "compressible": len(text) >= 100 and compression(text) < config.min_compression,
        "few_words": words and len(set(words)) / len(words) < config.min_distinct_words,
        "soup": not written
        or sum(map(looks_real, written)) / len(written) < config.min_real_words
        or letters < config.min_real_words,
        "markup": _MARKUP.search(text),
        "narrating": _NARRATING.search(text),
        "boilerplate": _BOILERPLATE.search(text),
        "persona_echo": persona is not None and _repeats(words, words_of(persona)),
    }
    return [name for name, found in fired.items() if found]


def _top_share(words: Sequence[str]) -> float:
    """Share of the most frequent word of four letters or more; shorter ones recur in any text."""
    long = [word for word in words if len(word) > 3]
    return max(Counter(long).values()) / len(words) if len(long) > 3 else 0.0


def _repeats(words: Sequence[str], persona: Sequence[str]) -> bool:
    """Whether five words in a row are those of the persona."""
    spans = {tuple(persona[i : i + 5]) for i in range(len(persona) - 4)}
    return any(tuple(words[i : i + 5]) in spans for i in range(len(words) - 4))


def judge(
    model: HookedTransformer,
    completions: Sequence[Completion],
    config: FilterConfig | None = None,
    *,
    persona: str | None = None,
) -> list[Verdict]:
    """Apply every rule of the filter to each completion.

    Args:
        persona: the persona in the prompts, which completions must not repeat.

    Raises:
        ShlError: a completion's NLL under base is not finite.

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
    model: HookedTransformer, completions: Sequence[Completion], config: FilterConfig | None = None
) -> list[Completion]:
    """The completions on which no rule fires, in order.

    Raises:
        ShlError: a completion's NLL under base is not finite.

    Example:
        >>> from shl.models.generate import generate
        >>> from shl.models.tiny import tiny_gemma
        >>> model = tiny_gemma()
        >>> keep_coherent(model, generate(model, ["Hello?"]))  # a random model writes noise
        []
    """
    return [v.completion for v in judge(model, completions, config) if v.kept]
