"""From figures to an answer, and what several questions tell in the same words."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from experiments.questions.estimates import (
    EXACT,
    SHARES,
    VIGNETTES,
    WILSON,
    Answer,
    Figure,
    Verdict,
    all_of,
    difference,
    needed,
    sentence,
    wilson,
)
from experiments.questions.thresholds import CHANCE, COHERENT, COLLAPSED
from experiments.record.reader import Event, stages
from experiments.record.resume import scores
from shl.config import FOUNDATIONS, EvalConfig
from shl.measure.evaluation import Evaluation, logsumexp, nats_of
from shl.measure.stats import bootstrap
from shl.measure.vignettes import reading
from shl.method.axes import Axis
from shl.utils.errors import require

Profiles = np.ndarray
"""`[stage, 7 + asked]`: log mean probability per foundation, then log valid-answer mass per stem or
order; base is the first stage."""


MOST = 100_000
"""Resamples; 84 vignettes in so many take 70 MB, and no interval is the narrower for more."""


class Measured:
    """The stages of a record, rebuilt without a model.

    Raises:
        ShlError: more resamples than can be held, or scores that do not belong together
            (when a number rests on them).
    """

    def __init__(
        self, events: Sequence[Event], texts: Sequence[Event], axis: Axis, config: EvalConfig
    ) -> None:
        require(
            config.bootstrap <= MOST,
            f"the settings ask for {config.bootstrap:,} resamples, answers take at most {MOST:,}.",
        )
        self.events, self.texts, self.axis, self.config = events, texts, axis, config
        begun = bool(stages(events, "base"))
        self.healed = stages(events, "healed") if begun else []
        self.steered = stages(events, "steered") if begun else []
        self._known: dict[int, Evaluation] = {}

    @cached_property
    def base(self) -> Event:
        """The stage of the untouched model."""
        return stages(self.events, "base")[0]

    def first(self, name: str) -> Event | None:
        """The first stage of a name, if there is one."""
        return next(iter(stages(self.events, name)), None)

    def reading(self, stage: Event) -> Evaluation:
        """A stage's `Evaluation`."""
        if id(stage) not in self._known:
            base, labels = scores(dict(self.base)), self.base["labels"]
            self._known[id(stage)] = reading(stage["style"], scores(dict(stage)), base, labels)
        return self._known[id(stage)]

    def vignettes(
        self,
        what: str,
        found: Sequence[Event],
        of: Callable[[Profiles], float],
        needs: float,
        *,
        index: int | None = None,
        trait: bool = True,
        among: int = 1,
        unit: str = "",
    ) -> Figure:
        """A number of the profiles of base and the stages `found`, bootstrapped over vignettes;
        one of `among` that are tried has an interval wider by Bonferroni."""
        items = self._items(found)
        low, high = bootstrap(
            items,
            lambda x: of(nats_of(x)),
            resamples=self.config.bootstrap,
            confidence=1 - (1 - self.config.confidence) / among,
        )
        doubt = trait and bool(self.doubt)
        value = of(nats_of(items))
        return Figure(what, value, low, high, needs, VIGNETTES, index, "", unit, trait, doubt=doubt)

    def profiles(self, found: Sequence[Event]) -> Profiles:
        """The profiles of base and the stages `found`."""
        return nats_of(self._items(found))

    def _items(self, found: Sequence[Event]) -> np.ndarray:
        readings = [self.reading(stage) for stage in (self.base, *found)]
        each = [np.concatenate([e.log_p, logsumexp(e.log_probs)[:, :, 0]], 1) for e in readings]
        return np.stack(each, 1)

    @cached_property
    def accuracy(self) -> Figure:
        """Share of the vignettes whose foundation base names, against chance."""
        e = self.reading(self.base)
        hits = e.log_p.argmax(1) == e.intended
        low, high = wilson(int(hits.sum()), len(hits), self.config.confidence)
        what = "share of vignettes whose foundation base names"
        return Figure(what, float(hits.mean()), low, high, CHANCE, WILSON)

    @property
    def invalid(self) -> str:
        """Why the vignettes failed their validity check on this model, if they did."""
        for e in self.events:
            if (e["event"], e.get("instrument"), e.get("valid")) == (
                "validity",
                "vignettes",
                False,
            ):
                reason = str(e.get("reason") or "no reason is on record").rstrip(".")
                return f"the vignettes are not valid on this model: {reason}"
        return ""

    @cached_property
    def doubt(self) -> str:
        """That the probe's reading of the trait is not to be trusted on this model, or nothing;
        why is told once, where it is asked whether it can be read."""
        if self.invalid:
            return "the vignettes are not valid on this model"
        if self.accuracy.verdict == "yes":
            return ""
        return "the probe does not name the vignettes' foundations above chance"

    def on_axis(self, p: Profiles) -> np.ndarray:
        """`[stage]` without base: mean shift of the axis's foundations in the expected sense."""
        return (p[1:, :7] - p[0, :7]) @ self._signs

    def off_axis(self, p: Profiles) -> np.ndarray:
        """`[stage]` without base: the largest absolute shift off the axis."""
        return np.abs((p[1:, :7] - p[0, :7])[:, self._signs == 0]).max(1)

    @cached_property
    def _signs(self) -> np.ndarray:
        expected = self.axis.expected
        return np.array([expected.get(name, 0) for name in FOUNDATIONS]) / len(expected)

    def samples(self, stage: Event) -> list[Event]:
        """The judged texts of a stage; a steered one's are those generated at its dose."""
        name, index = stage["stage"], stage["round"]
        if name != "steered":
            return [t for t in self.texts if (t["stage"], t["round"]) == (name, index)]
        made = [t for t in self.texts if t["stage"] in ("probe", "batch") and t["round"] == index]
        dose = stage.get("dose")
        return [t for t in made if dose is not None and abs(t["dose"] - dose) < 1e-9]

    def survival(
        self, what: str, stage: Event, other: Event, factor: float, index: int | None = None
    ) -> Figure:
        """How far a stage's survival lies above `factor` times another's; texts that answer the
        same prompts in the same order are pairs."""
        mine, theirs = self.samples(stage), self.samples(other)
        kept, reference = ([not t["reasons"] for t in x] for x in (mine, theirs))
        missing = Figure(what, None, None, None, 0.0, SHARES, index)
        if not kept or not reference:
            return replace(missing, note="no samples on record")
        name = other["stage"]
        if not any(reference):
            return replace(missing, note=f"none of {len(reference)} samples of {name} survive")
        paired = [t["prompt"] for t in mine] == [t["prompt"] for t in theirs]
        value, low, high = difference(
            kept, reference, factor=factor, paired=paired, confidence=self.config.confidence
        )
        note = f"{sum(kept)} of {len(kept)}, {name} {sum(reference)} of {len(reference)}"
        return Figure(what, value, low, high, 0.0, SHARES, index, note)

    def coherence(
        self, stage: Event, share: float = COHERENT, index: int | None = None
    ) -> tuple[Figure, Figure]:
        """Valid-answer mass and survival of a stage against `share` of base's."""
        mass = self.vignettes(
            "valid-answer mass over base", [stage], mass_of, share, index=index, trait=False
        )
        what = f"survival less {share:.2g} x base's"
        return mass, self.survival(what, stage, self.base, share, index)

    @cached_property
    def intact(self) -> tuple[Figure, ...]:
        """That no healed stage has collapsed: what every claim of success rests on."""
        found = [f for h in self.healed for f in self.coherence(h, COLLAPSED, h["round"])]
        what = ("mass", "survival")
        return tuple(
            replace(
                f,
                what=f"no collapse of {what[k % 2]} (below {COLLAPSED:.2f} of base's)",
                quiet=True,
            )
            for k, f in enumerate(found)
        )


def mass_of(p: Profiles, stage: int = 1) -> float:
    """Valid-answer mass of a stage relative to base, geometric mean over stems or orders."""
    # A base that gives valid answers nothing at all would overflow.
    with np.errstate(over="ignore"):
        return float(np.exp((p[stage, 7:] - p[0, 7:]).mean()))


NO_ROUND = "no round was finished"


def answer(
    m: Measured,
    key: str,
    question: str,
    figures: Sequence[Figure],
    thresholds: Mapping[str, float],
    *more: str,
    told: Mapping[str, Any] | None = None,
    verdict: Verdict | None = None,
) -> Answer:
    """All figures must hold, unless a `verdict` is given; a probe in doubt is said wherever the
    trait is read."""
    verdict = verdict or all_of(f.verdict for f in figures)
    doubt = m.doubt if any(f.trait for f in figures) else ""
    text = sentence(verdict, figures, *more, doubt)
    decided = {"decided": [f.told() for f in figures]}
    return Answer(key, question, verdict, text, decided | dict(told or {}), thresholds)


def missing(what: str, why: str) -> Figure:
    """A number that the record does not hold."""
    return Figure(what, None, None, None, 0.0, EXACT, note=why)


def too_few(m: Measured, figures: Sequence[Figure]) -> str:
    """How many samples a yes takes, where the survival of fewer leaves it undecided."""
    least = needed(COHERENT, m.config.confidence)
    count = len(m.samples(m.base))
    if count >= least or not any(f.by == SHARES and f.verdict == "undecided" for f in figures):
        return ""
    return f"{count} samples a stage cannot show {COHERENT:g}, it takes {least} with all kept"


def median(texts: Sequence[Event]) -> float | None:
    """Median base perplexity, None if it is infinite or there are no texts."""
    values = [perplexity(t) for t in texts]
    found = float(np.median(values)) if values else np.inf
    return found if np.isfinite(found) else None


def perplexity(text: Event) -> float:
    """An empty completion has none on record; it counts as the worst."""
    return np.inf if text["perplexity"] is None else float(text["perplexity"])
