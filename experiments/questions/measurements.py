"""Estimates from the stages of a record, and the step from estimates to an answer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from experiments.questions import thresholds
from experiments.questions.estimates import (
    EXACT,
    SHARES,
    Answer,
    Estimate,
    Outcome,
    all_of,
    difference,
    number,
    sentence,
    wilson,
)
from experiments.questions.thresholds import (
    CHANCE,
    COHERENT,
    COLLAPSED,
    SEPARATES,
    SURVIVAL_LOSS,
)
from experiments.record.reader import Event, items_of, samples, stages
from experiments.record.resume import scores
from experiments.record.schema import name_of
from shl.config import FOUNDATIONS, EvalConfig
from shl.measure.evaluation import Evaluation, log_mass, nats_of, on_axis
from shl.measure.nulls import Nulls
from shl.measure.stats import bootstrap
from shl.measure.vignettes import reading
from shl.method.axes import Axis
from shl.utils.errors import require

Profiles = np.ndarray
"""`[stage, 7 + paraphrase]`: log mean probability per foundation, then log valid-answer mass per
paraphrase; base is the first stage."""

NO_ROUND = "no round was finished"

TIMES = 10
"""Resamples of an answer over those of a stage's interval. Drawn again, bounds of 1,000 move by
0.08 standard errors and of 10,000 by 0.03; an answer should not depend on the drawing."""


class Measurements:
    """The stages of a record, rebuilt without a model; raises as `answer_all`."""

    def __init__(
        self, events: Sequence[Event], texts: Sequence[Event], axis: Axis, config: EvalConfig
    ) -> None:
        self.events, self.texts, self.axis, self.config = events, texts, axis, config
        measured = bool(stages(events, "base"))
        self.healed = self._readable("healed") if measured else []
        self.steered = self._readable("steered") if measured else []
        self._evaluations: dict[int, Evaluation] = {}

    def _readable(self, name: str) -> list[Event]:
        """The stages of a name; without expected foundations, those that the cloze has read."""
        found = stages(self.events, name)
        if self.axis.expected:
            return found
        return [e for e in found if items_of(self.events, "cloze", e) is not None]

    @cached_property
    def base(self) -> Event:
        """The stage of the untouched model."""
        return stages(self.events, "base")[0]

    def first(self, name: str) -> Event | None:
        """The first stage of a name, if there is one."""
        return next(iter(stages(self.events, name)), None)

    def evaluation(self, stage: Event) -> Evaluation:
        """A stage's `Evaluation`."""
        known, base = self._evaluations, self.base
        if id(stage) not in known:
            both = scores(stage), scores(base)
            known[id(stage)] = reading(stage["style"], *both, base["labels"])
        return known[id(stage)]

    def vignettes(
        self,
        what: str,
        found: Sequence[Event],
        statistic: Callable[[Profiles], float],
        threshold: float,
        *,
        comparisons: int = 1,
        **more: Any,
    ) -> Estimate:
        """A statistic of the profiles of base and the stages `found`, bootstrapped over vignettes;
        with several `comparisons` its interval is widened by Bonferroni."""
        items = self._items(found)

        def of(x: np.ndarray) -> float:
            return statistic(nats_of(x))

        return self._bootstrap(what, items, of, threshold, "vignettes", comparisons, **more)

    def _bootstrap(
        self,
        what: str,
        items: np.ndarray,
        statistic: Callable[[np.ndarray], float],
        threshold: float,
        over: str,
        comparisons: int = 1,
        **more: Any,
    ) -> Estimate:
        interval = bootstrap(
            items,
            statistic,
            resamples=TIMES * self.config.bootstrap,
            confidence=1 - (1 - self.config.confidence) / comparisons,
        )
        method = f"bootstrap over {over}, paired"
        return Estimate(what, (statistic(items), *interval), threshold, method, **more)

    def read(self, instrument: str, found: Sequence[Event]) -> np.ndarray | None:
        """`[item, stage]`: readings of stages by an instrument of `shl.measure.continuations`, None
        if one of them is not on record."""
        lines = [items_of(self.events, instrument, stage) for stage in found]
        values = [line["items"] for line in lines if line is not None]
        counts = sorted({len(items) for items in values})
        require(
            len(counts) < 2,
            f"the readings of {instrument} have {counts} items, all stages must have the same.",
        )
        return np.array(values).T if len(values) == len(found) else None

    @cached_property
    def uses_context(self) -> bool:
        """Whether the conflicts are valid on this model, as a measure of coherence: base follows
        the text before it in `SEPARATES` of the items or more, and beyond doubt on average."""
        items = self.read("context", [self.base]) if self.first("base") else None
        return items is not None and self._valid("base", items[:, 0])

    @cached_property
    def reads_cloze(self) -> bool:
        """Whether the axis's cloze is valid on this model: the personas differ in the expected
        direction in `SEPARATES` of the openings or more, and beyond doubt on average, and the first
        stage that a vector steers, if there is one, shifts it further than random vectors do."""
        if self.by_vector and (limits := self.null_interval(self.steered[0])) is not None:
            steered = self.read("cloze", [self.base, self.steered[0]])
            if steered is None or float((steered[:, 1] - steered[:, 0]).mean()) <= limits[1]:
                return False
        personas = [self.first("prompted+"), self.first("prompted-")]
        found = [stage for stage in personas if stage is not None]
        items = self.read("cloze", found) if len(found) == 2 else None
        return items is not None and self._valid("personas", items[:, 0] - items[:, 1])

    @property
    def by_vector(self) -> bool:
        """Whether there is a steered stage, and a vector steers the first one."""
        return bool(self.steered) and self.steered[0].get("dose") != 0

    @cached_property
    def nulls(self) -> dict[str, Nulls]:
        """What random vectors do to the cloze, or to each foundation of the vignettes and, as
        "axis", to those of the axis together, as far as that is on record."""
        found = {
            e["instrument"]: Nulls(tuple(e["levels"]), np.array(e["values"]))
            for e in self.events
            if e["event"] == "nulls"
        }
        if self.axis.expected and set(FOUNDATIONS) <= set(found):
            every = [found[name] for name in FOUNDATIONS]
            sizes = sorted({(table.levels, table.values.shape) for table in every})
            require(
                len(sizes) == 1,
                f"the random vectors of the foundations have levels and shapes {sizes}, all must "
                "have the same.",
            )
            values = np.stack([table.values for table in every], -1)
            found["axis"] = Nulls(every[0].levels, on_axis(values, self.axis.expected))
        return found

    def null_interval(self, stage: Event, instrument: str = "cloze") -> tuple[float, float] | None:
        """The shifts of random vectors at a stage's KL to base, nats."""
        kl = self.read("kl", [stage])
        if instrument not in self.nulls or kl is None:
            return None
        return self.nulls[instrument].interval(float(kl.mean()), self.config.confidence)

    @property
    def by_cloze(self) -> bool:
        """Whether shifts are those of the cloze: it is valid on this model, or the axis expects no
        foundation, so that nothing else reads its trait."""
        return self.reads_cloze or not self.axis.expected

    def _valid(self, what: str, items: np.ndarray) -> bool:
        mean = self._bootstrap(what, items[:, None], lambda x: float(x.mean()), 0.0, "items")
        return float((items > 0).mean()) >= SEPARATES and mean.outcome == "yes"

    def ratio(
        self,
        what: str,
        found: Sequence[Event],
        threshold: float,
        statistic: Callable[[np.ndarray], float] = lambda r: float(r[0]),
        **more: Any,
    ) -> Estimate:
        """A statistic of the coherence of the stages `found` over base's, one number per stage: the
        use of context where that is valid on this model, else the valid-answer mass.

        In `what`, COHERENCE stands for the name of that measure.
        """
        items = self.read("context", [self.base, *found]) if self.uses_context else None
        if items is None:
            what = what.replace("COHERENCE", "valid-answer mass")
            return self.vignettes(what, found, lambda p: statistic(masses(p)), threshold, **more)

        def of(x: np.ndarray) -> float:
            mean = x.mean(0)
            return statistic(mean[1:] / mean[0])

        return self._bootstrap(
            what.replace("COHERENCE", "use of context"),
            items,
            of,
            threshold,
            "pairs of conflicts",
            **more,
        )

    def shift(
        self,
        what: str,
        found: Sequence[Event],
        statistic: Callable[[np.ndarray], float],
        threshold: float = 0.0,
        *,
        off: bool = False,
        unit: str = " nats",
        **more: Any,
    ) -> Estimate:
        """A statistic of the on-axis shifts of the stages `found`, one number per stage: of the
        axis's cloze (see `by_cloze`), else of the vignettes; with `off`, the largest absolute
        off-axis shifts of the vignettes follow."""
        read = self.read("cloze", [self.base, *found]) if self.by_cloze and not off else None
        more |= {"unit": unit, "trait": True, "doubt": bool(self.doubt)}
        if read is not None:
            shifts = read[:, 1:] - read[:, :1]

            def of_mean(x: np.ndarray) -> float:
                return float(statistic(x.mean(0)))

            return self._bootstrap(what, shifts, of_mean, threshold, "openings", **more)
        expected = self.axis.expected
        others = [name not in expected for name in FOUNDATIONS]

        def of(p: Profiles) -> float:
            moved = p[1:, :7] - p[0, :7]
            shifts = on_axis(moved, expected)
            return float(statistic(np.r_[shifts, abs(moved[:, others]).max(1)] if off else shifts))

        return self.vignettes(what, found, of, threshold, **more)

    def shifts(self, found: Sequence[Event]) -> list[float]:
        """The on-axis shifts of stages, nats."""
        read = self.read("cloze", [self.base, *found]) if self.by_cloze else None
        if read is not None:
            return [float(x) for x in (read[:, 1:] - read[:, :1]).mean(0)]
        p = nats_of(self._items(found))[:, :7]
        return [float(x) for x in on_axis(p[1:] - p[0], self.axis.expected)]

    def _items(self, found: Sequence[Event]) -> np.ndarray:
        every = [self.evaluation(stage) for stage in (self.base, *found)]
        return np.stack([np.concatenate([e.log_p, log_mass(e.log_probs)], 1) for e in every], 1)

    @cached_property
    def accuracy(self) -> Estimate:
        """Share of the vignettes whose foundation base chooses, against chance."""
        e = self.evaluation(self.base)
        hits = e.log_p.argmax(1) == e.intended
        what = "share of vignettes whose foundation base chooses"
        return self.share(what, int(hits.sum()), len(hits), CHANCE)

    def share(self, what: str, hits: int, total: int, threshold: float) -> Estimate:
        """A share with its Wilson interval."""
        limits = (hits / total, *wilson(hits, total, self.config.confidence))
        return Estimate(what, limits, threshold, "Wilson")

    @cached_property
    def invalid(self) -> str:
        """Why the vignettes failed their validity check on this model, if they did."""
        for e in self.events:
            if name_of(e) == "validity:vignettes" and not e["valid"]:
                return f"the vignettes are not valid on this model: {e['reason'].rstrip('.')}"
        return ""

    @cached_property
    def doubt(self) -> str:
        """That no instrument measures the trait on this model, or nothing."""
        if self.reads_cloze:
            return ""
        if not self.axis.expected:
            return "the axis's cloze is not valid on this model"
        if self.invalid:
            return "the vignettes are not valid on this model"
        if self.accuracy.outcome != "yes":
            return "base does not choose the vignettes' foundations above chance"
        limits = self.null_interval(self.steered[0], "axis") if self.by_vector else None
        if limits is not None and self.shifts(self.steered[:1])[0] <= limits[1]:
            return "random vectors of the same KL shift the vignettes as far as the first vector"
        return ""

    def samples(self, stage: Event) -> list[Event]:
        """The judged texts of a stage."""
        return samples(self.texts, stage)

    def survival_difference(
        self, ours: Sequence[Event], theirs: Sequence[Event], factor: float = 1.0
    ) -> tuple[float, float, float]:
        """Share of texts that survive less `factor` times that of others, with its interval. Texts
        that answer the same prompts in the same order are pairs."""
        kept, other = ([not t["reasons"] for t in texts] for texts in (ours, theirs))
        paired = [t["prompt"] for t in ours] == [t["prompt"] for t in theirs]
        confidence = self.config.confidence
        return difference(kept, other, factor=factor, paired=paired, confidence=confidence)

    def survival(
        self,
        what: str,
        stage: Event,
        other: Event,
        *,
        share: float | None = None,
        round: int | None = None,
    ) -> Estimate:
        """Survival of a stage less another's, against -`SURVIVAL_LOSS`; or with `share` less that
        share of the other's, against 0."""
        ours, theirs, name = self.samples(stage), self.samples(other), other["stage"]
        if not ours or not theirs:
            return missing(what, "no samples on record", round)
        kept, reference = (sum(not t["reasons"] for t in texts) for texts in (ours, theirs))
        if not reference:
            return missing(what, f"none of {len(theirs)} samples of {name} survive", round)
        limits = self.survival_difference(ours, theirs, 1.0 if share is None else share)
        note = f"{kept} of {len(ours)}, {name} {reference} of {len(theirs)}"
        least = -SURVIVAL_LOSS if share is None else 0.0
        return Estimate(what, limits, least, SHARES, round, note)

    def coherence(self, h: Event, **more: Any) -> tuple[Estimate, Estimate]:
        """Use of context (or valid-answer mass) and survival of a stage against base's."""
        return (
            self.ratio("COHERENCE over base's", [h], COHERENT, **more),
            self.survival("survival less base's", h, self.base, **more),
        )

    @cached_property
    def intact(self) -> tuple[Estimate, ...]:
        """That no healed stage has collapsed, without which nothing counts as a success."""
        found = []
        measure = "use of context" if self.uses_context else "mass"
        mass = f"no collapse: {measure} over base's"
        survival = f"no collapse: survival less {number(COLLAPSED)} x base's"
        for h in self.healed:
            k, base = h["round"], self.base
            found.append(self.ratio(mass, [h], COLLAPSED, round=k))
            found.append(self.survival(survival, h, base, share=COLLAPSED, round=k))
        return tuple(replace(e, quiet=True) for e in found)


@dataclass(frozen=True)
class Finding:
    """What a question finds: all estimates must hold, unless a `verdict` is given."""

    estimates: Sequence[Estimate]
    notes: Sequence[str] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    verdict: Outcome | None = None


def question(
    key: str, text: str, *names: str, healed: bool = True
) -> Callable[[Callable[[Measurements], Finding]], Callable[[Measurements], Answer]]:
    """Turn a function that gives a `Finding` into a question.

    `names` are the thresholds that decide; with `healed` it is undecided before a finished round.
    """

    def decorate(find: Callable[[Measurements], Finding]) -> Callable[[Measurements], Answer]:
        return partial(_ask, key, text, names, healed, find)

    return decorate


def _ask(
    key: str,
    text: str,
    names: Sequence[str],
    healed: bool,
    find: Callable[[Measurements], Finding],
    m: Measurements,
) -> Answer:
    waits = healed and not m.healed
    found = Finding([missing("healed stage")]) if waits else find(m)
    limits = {name: getattr(thresholds, name) for name in names}
    notes, estimates = [*found.notes], found.estimates
    if any(e.trait for e in estimates):
        notes.append(m.doubt)
    verdict = found.verdict or all_of(e.outcome for e in estimates)
    figures = {"decided": [e.as_json() for e in estimates], **found.figures}
    words = sentence(verdict, estimates, *notes)
    return Answer(key, text, verdict, words, figures, limits, tuple(estimates))


def masses(p: Profiles) -> np.ndarray:
    """Valid-answer mass of each stage relative to base, geometric mean over paraphrases."""
    # A base that gives valid answers no mass at all would overflow.
    with np.errstate(over="ignore"):
        return np.asarray(np.exp((p[1:, 7:] - p[0, 7:]).mean(1)))


def missing(what: str, why: str = NO_ROUND, index: int | None = None) -> Estimate:
    """An estimate that the record cannot give."""
    return Estimate(what, None, 0.0, EXACT, index, why)


def median_perplexity(texts: Sequence[Event]) -> float | None:
    """Median base perplexity, None if it is infinite or there are no texts."""
    found = float(np.median([perplexity(t) for t in texts])) if texts else np.inf
    return found if np.isfinite(found) else None


def perplexity(text: Event) -> float:
    """Base perplexity; an empty completion has none on record and counts as the worst."""
    return np.inf if text["perplexity"] is None else float(text["perplexity"])
