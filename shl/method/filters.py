"""The coherence filter: text rules and bounds on scores under base, with every reason for dropping
a text.

Perplexity is that of the base model given the prompt, on the whole completion and on its last
quarter, where text collapses first. Text that base finds as likely after other questions as after
its own is off topic.
"""

import math
import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from shl.config import FilterConfig
from shl.hooks.handle import suspended
from shl.models.generate import Completion
from shl.models.scores import base_perplexities, token_nll
from shl.models.tokens import Prompt, encode
from shl.utils.files import texts_in
from shl.utils.model import Model

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
    "off_topic",
)
"""Every reason that `judge` can give."""
OTHERS = 2
"""Other questions that a completion is scored after [count]."""

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
    """A completion with every rule that fired on it, its base perplexities, and its topic score
    (nats per token, see `topic_scores`), None where that was not computed."""

    completion: Completion
    reasons: tuple[str, ...]
    perplexity: float
    tail_perplexity: float
    topic: float | None = None

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


def other_questions(questions: Sequence[str]) -> dict[str, list[str]]:
    """For each question, the `OTHERS` distinct ones that follow it in order of first appearance,
    the first after the last; if there are too few, neutral ones from data/contexts.toml.

    Example:
        >>> other_questions(["a", "b", "a", "c"])
        {'a': ['b', 'c'], 'b': ['c', 'a'], 'c': ['a', 'b']}
    """
    distinct = list(dict.fromkeys(questions))
    neutral = texts_in("contexts.toml", "everyday")
    found = {}
    for i, question in enumerate(distinct):
        others = dict.fromkeys([*distinct[i + 1 :], *distinct[:i], *neutral])
        found[question] = [other for other in others if other != question][:OTHERS]
    return found


def topic_scores(
    model: Model,
    completions: Sequence[Completion],
    perplexities: Sequence[float],
    others: Mapping[str, Sequence[str]],
    *,
    batch_size: int = 16,
) -> list[float]:
    """Mean over each completion's tokens of log p(x | its question) - log p(x | other question),
    and over the other questions; nats per token, under base with all handles suspended.

    Args:
        completions: each with at least one token.
        perplexities: of each completion under base, from `base_perplexities`.
        others: the other questions by question; they are asked as its own is, with its persona.

    Example:
        >>> from shl.models.generate import generate
        >>> from shl.models.tiny import tiny_gemma
        >>> model = tiny_gemma()
        >>> texts = generate(model, ["Hello?"], max_new_tokens=3, min_new_tokens=3)
        >>> [(whole, _)] = base_perplexities(model, texts)
        >>> [score] = topic_scores(model, texts, [whole], {"Hello?": ["Hello?"]})
        >>> abs(score) < 1e-4  # after the same question
        True
    """
    asked = []
    for c in completions:
        for text in others[c.prompt.text]:
            prompt = Prompt(text, c.prompt.persona)
            asked.append(replace(c, prompt=prompt, prompt_tokens=tuple(encode(model, prompt))))
    with suspended(model):
        losses = iter(token_nll(model, asked, batch_size=batch_size))
    scores = []
    for c, perplexity in zip(completions, perplexities, strict=True):
        elsewhere = [float(next(losses).mean()) for _ in others[c.prompt.text]]
        scores.append(sum(elsewhere) / len(elsewhere) - math.log(perplexity))
    return scores


def judge(
    model: Model,
    completions: Sequence[Completion],
    config: FilterConfig | None = None,
    *,
    persona: str | None = None,
    reuse_nll: bool = False,
) -> list[Verdict]:
    """Apply every rule of the filter to each completion.

    The rule `off_topic` compares a completion with the questions of the other completions of the
    same call (see `other_questions`), so its score depends on those. It takes `OTHERS` forward
    passes, and is only applied where no other rule fires.

    Args:
        persona: the persona in the prompts, which completions must not repeat.
        reuse_nll: see `shl.models.scores.base_perplexities`.

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
    size = config.batch_size
    scores = base_perplexities(model, completions, batch_size=size, reuse_nll=reuse_nll)
    verdicts = []
    for completion, (whole, tail) in zip(completions, scores, strict=True):
        reasons = text_reasons(completion.text, config, persona)
        if tail > config.max_tail_perplexity:
            reasons.append("incoherent")
        if min(whole, tail) < config.min_perplexity:
            reasons.append("too_predictable")
        ordered = tuple(sorted(reasons, key=RULES.index))
        verdicts.append(Verdict(completion, ordered, whole, tail))
    if config.min_topic is None:
        return verdicts
    others = other_questions([c.prompt.text for c in completions])
    left = [i for i, v in enumerate(verdicts) if v.kept and v.completion.tokens]
    topics = topic_scores(
        model,
        [verdicts[i].completion for i in left],
        [verdicts[i].perplexity for i in left],
        others,
        batch_size=size,
    )
    for i, topic in zip(left, topics, strict=True):
        off = ("off_topic",) if topic < config.min_topic else ()
        verdicts[i] = replace(verdicts[i], reasons=off, topic=topic)
    return verdicts


def keep_coherent(
    model: Model, completions: Sequence[Completion], config: FilterConfig | None = None
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
