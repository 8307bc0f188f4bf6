"""`love`: steer, filter, heal, and again; yields a frozen `Round` at a time.

No files, no printing, no pictures: `observe` is told of every finished stage, so that a caller
can keep what has been computed; `recall` is asked before a stage is computed, so that a caller who
kept it need not compute it again. Random draws are functions of (seed, round, stage, item), so a
run that goes on from what it recalls ends with the same bits as one that was never cut off.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from transformer_lens import HookedTransformer

from shl.config import LoopConfig
from shl.hooks.adapter import Adapter
from shl.hooks.bake import baked
from shl.hooks.vector import SteeringVector
from shl.measure.evaluation import Evaluation
from shl.measure.vignettes import evaluate, remember_base
from shl.method.axes import Axis
from shl.method.dose import Walk, after_batch, ladder, settle, start
from shl.method.extract import extract_vector, random_like
from shl.method.filters import Verdict, judge
from shl.method.heal import Healed, train_adapter
from shl.models.generate import Completion, generate, without_persona
from shl.models.nan_checks import named
from shl.models.tokens import Prompt
from shl.utils.errors import ShlError
from shl.utils.seeds import seed_for


@dataclass(frozen=True)
class Stage:
    """One model measured: the probe, and free samples with their verdicts."""

    name: str
    evaluation: Evaluation
    samples: tuple[Verdict, ...]

    @property
    def survival(self) -> float:
        """Share of the free samples that pass the filter."""
        return sum(v.kept for v in self.samples) / len(self.samples)

    @property
    def perplexity(self) -> float:
        """Median base perplexity of the free samples."""
        return float(np.median([v.perplexity for v in self.samples]))

    @property
    def nats(self) -> dict[str, float]:
        """The probe's reading, per foundation."""
        return self.evaluation.nats

    @property
    def coherence(self) -> float:
        """The probe's valid-answer mass relative to base."""
        return self.evaluation.coherence


def measure(
    model: HookedTransformer,
    axis: Axis,
    config: LoopConfig,
    name: str,
    *,
    persona: str | None = None,
) -> Stage:
    """The model as it stands, read by the probe and sampled without steering of our own."""
    evaluation = evaluate(model, persona=persona, config=config.eval)
    # Every stage answers the same prompts with the same draws.
    texts = sample_texts(model, axis, config, config.eval.samples, ("sample",), persona=persona)
    return Stage(name, evaluation, tuple(judge(model, texts, config.filter, persona=persona)))


def sample_texts(
    model: HookedTransformer,
    axis: Axis,
    config: LoopConfig,
    count: int,
    key: Sequence[int | str],
    *,
    persona: str | None = None,
) -> list[Completion]:
    """`count` answers to the axis's prompts in turn; `key` separates this use's random draws."""
    prompts = [Prompt(axis.prompts[i % len(axis.prompts)], persona) for i in range(count)]
    return generate(model, prompts, **vars(config.generate), seed=seed_for(config.seed, *key))


Observer = Callable[[str, int, Mapping[str, Any]], None]
"""Called as `observe(event, round, values)` after a stage; round is -1 before the first."""
Recall = Callable[[str, int, str], Mapping[str, Any] | None]
"""Called as `recall(event, round, part)` before a stage; the values that `observe` was given when
an earlier process finished it, or None. `part` is the stage's name or the batch's number. For the
event "training" it is the `Training` of a healing that was cut off, under "state"; that of a
"reading" is "NAME:STAGE"."""
Instrument = Callable[[HookedTransformer, str | None], Mapping[str, Any]]
"""Called with the model as it stands, hooks included, and the persona's text or None; what it
returns is observed as the event "reading"."""


class StarvedError(ShlError):
    """Too few completions survived the filter to train on."""


@dataclass(frozen=True)
class Round:
    """Everything that one round made and measured.

    `probes` are the judged rows of the dose ladder, `dreams` those of the full batches at
    `kappa`; `kept` is what the adapter was trained on.

    Example:
        >>> list(Round.__dataclass_fields__)[:5]
        ['index', 'vector', 'walk', 'kappa', 'dose']
    """

    index: int
    vector: SteeringVector
    walk: Walk
    kappa: float
    dose: float
    probes: tuple[Verdict, ...]
    dreams: tuple[Verdict, ...]
    kept: tuple[Completion, ...]
    healing: Healed
    steered: Stage
    healed: Stage

    @property
    def adapter(self) -> Adapter:
        """The round's frozen adapter."""
        return self.healing.adapter


MATCHED_ON = 8
"""Questions whose answers by the student the random control is matched on [count]."""

_LABELS = {
    "stage": "measuring {}",
    "vector": "extracting the vector",
    "probe": "probing doses",
    "batch": "batch {}",
    "healed": "healing",
    "reading": "reading {}",
}


@dataclass(frozen=True)
class Study:
    """What every stage needs, and how each is computed once."""

    model: HookedTransformer
    axis: Axis
    config: LoopConfig
    observe: Observer
    recall: Recall
    instruments: Mapping[str, Instrument] = field(default_factory=dict)

    @property
    def persona(self) -> str | None:
        """What is in the prompt while completions are made."""
        return self.axis.positive if self.config.prompted else None

    def once(
        self, event: str, index: int, part: str, make: Callable[[], Mapping[str, Any]]
    ) -> Mapping[str, Any]:
        """A stage's values: recalled, or made and observed."""
        known = self.recall(event, index, part)
        if known is not None:
            return known
        where = f"round {index}, " if index >= 0 else ""
        with named(f"{where}{_LABELS[event].format(part)}"):
            values = make()
        self.observe(event, index, values)
        return values

    def stage(self, index: int, name: str, *, persona: str | None = None) -> Stage:
        """The model as it stands, measured without steering."""
        values = self.once(
            "stage",
            index,
            name,
            lambda: {"stage": measure(self.model, self.axis, self.config, name, persona=persona)},
        )
        self.read(index, name, persona=persona)
        return values["stage"]

    def read(
        self,
        index: int,
        name: str,
        *,
        persona: str | None = None,
        under: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """The same stage through every instrument, each once, hooks of `under` on."""

        def make(instrument: str) -> dict[str, Any]:
            with under():
                found = self.instruments[instrument](self.model, persona)
            return {"instrument": instrument, "stage": name, "reading": found}

        for instrument in self.instruments:
            self.once("reading", index, f"{instrument}:{name}", partial(make, instrument))

    def round(self, index: int, before: tuple[Adapter, ...]) -> Round:
        """Steer, filter, heal, and measure both sides of it."""
        model, config = self.model, self.config
        with baked(model, before):
            vector = self.vector(index)
            walk, probes = self.probe(index, vector)
            walk, dreams = self.dream(index, vector, walk, probes)
            banked = _bank(config, walk, (*probes, *dreams))
            kept = tuple(without_persona(model, completion) for completion in banked)
            steered = self.steered(index, vector, walk, (*probes, *dreams))
            healing = self.heal(index, kept)
        with baked(model, (*before, healing.adapter)):
            healed = self.stage(index, "healed")
        dose = walk.kappa * config.dose.alpha
        return Round(
            index, vector, walk, walk.kappa, dose, probes, dreams, kept, healing, steered, healed
        )

    def vector(self, index: int) -> SteeringVector:
        """This round's vector, read on the student that enters it."""
        return self.once(
            "vector",
            index,
            "",
            lambda: {"vector": self._extract(index)},
        )["vector"]

    def _extract(self, index: int) -> SteeringVector:
        ask, config = self.config.vector, self.config
        vector = extract_vector(
            self.model,
            self.axis,
            ask.layers,
            contexts=ask.contexts,
            batch_size=ask.batch_size,
            round=index,
            against=ask.against,
        )
        if ask.direction == "contrast":
            return vector
        # The middle of the ladder is where walks end up; at its top both are soup.
        kappas = ladder(config.dose)
        return random_like(
            self.model,
            vector,
            self.axis.prompts[:MATCHED_ON],
            dose=kappas[len(kappas) // 2] * config.dose.alpha,
            seed=seed_for(config.seed, "random"),
        )

    def steered(
        self, index: int, vector: SteeringVector, walk: Walk, verdicts: Sequence[Verdict]
    ) -> Stage:
        """The student as it made this round's texts, on the probe: steered, or prompted."""
        dose = walk.kappa * self.config.dose.alpha
        own = tuple(v for v in verdicts if abs(v.completion.dose - dose) < 1e-9)

        def make() -> dict[str, Any]:
            with vector.steering(self.model, dose):
                reading = evaluate(self.model, persona=self.persona, config=self.config.eval)
            return {"stage": Stage("steered", reading, own), "kappa": walk.kappa, "dose": dose}

        stage = self.once("stage", index, "steered", make)["stage"]
        self.read(index, "steered", under=lambda: vector.steering(self.model, dose))
        return stage

    def heal(self, index: int, kept: Sequence[Completion]) -> Healed:
        """The round's adapter, from where an earlier process left its training."""

        def make() -> dict[str, Any]:
            left = self.recall("training", index, "")
            healing = train_adapter(
                self.model,
                kept,
                self.config.heal,
                index=index,
                rounds=self.config.rounds,
                seed=seed_for(self.config.seed, "heal", index),
                axis=self.axis.name,
                resume=left["state"] if left else None,
                on_step=lambda step, total, state: self.observe(
                    "step", index, {"step": step, "total": total, "state": state}
                ),
            )
            return {"healing": healing}

        return self.once("healed", index, "", make)["healing"]

    def probe(self, index: int, vector: SteeringVector) -> tuple[Walk, tuple[Verdict, ...]]:
        """All rungs of the ladder as rows of the same batches; the same prompts at every rung."""
        config, walk = self.config, start(self.config.dose)
        if not config.dose.walk:
            return walk, ()
        size = config.dose.probe_size
        doses = torch.tensor([k * config.dose.alpha for k in walk.kappas], dtype=torch.float64)
        prompts = [
            Prompt(self.axis.prompts[(index * size + i) % len(self.axis.prompts)], self.persona)
            for _ in walk.kappas
            for i in range(size)
        ]

        def make() -> dict[str, Any]:
            with vector.steering(self.model, doses.repeat_interleave(size)):
                texts = generate(
                    self.model,
                    prompts,
                    **vars(config.generate),
                    seed=seed_for(config.seed, "probe", index),
                )
            verdicts = judge(self.model, texts, config.filter, persona=self.persona)
            counts = {
                kappa: (sum(v.kept for v in verdicts[j * size : (j + 1) * size]), size)
                for j, kappa in enumerate(walk.kappas)
            }
            return {"verdicts": verdicts, "walk": settle(walk, counts)}

        found = self.once("probe", index, "", make)
        return found["walk"], tuple(found["verdicts"])

    def dream(
        self, index: int, vector: SteeringVector, walk: Walk, probes: tuple[Verdict, ...]
    ) -> tuple[Walk, tuple[Verdict, ...]]:
        """Full batches at the walk's dose until enough survive."""
        config = self.config
        dreams: list[Verdict] = []
        for batch in range(config.dose.max_batches):
            if len(_bank(config, walk, (*probes, *dreams))) >= config.dose.min_train:
                break
            found = self.once(
                "batch", index, str(batch), partial(self._batch, index, batch, vector, walk)
            )
            walk = found["walk"]
            dreams += found["verdicts"]
        _enough(config, index, walk, (*probes, *dreams))
        return walk, tuple(dreams)

    def _batch(self, index: int, batch: int, vector: SteeringVector, walk: Walk) -> dict[str, Any]:
        config = self.config
        with vector.steering(self.model, walk.kappa * config.dose.alpha):
            texts = sample_texts(
                self.model,
                self.axis,
                config,
                config.dose.batch_size,
                ("dream", index, batch),
                persona=self.persona,
            )
        verdicts = judge(self.model, texts, config.filter, persona=self.persona)
        walk = after_batch(walk, sum(v.kept for v in verdicts), len(verdicts))
        return {"verdicts": verdicts, "walk": walk, "batch": batch}


def _enough(config: LoopConfig, index: int, walk: Walk, verdicts: Sequence[Verdict]) -> None:
    banked = len(_bank(config, walk, verdicts))
    if banked >= config.dose.min_train:
        return
    dropped = Counter(reason for v in verdicts for reason in v.reasons)
    listed = ", ".join(f"{name} {count}" for name, count in dropped.most_common())
    raise StarvedError(
        f"round {index}: {banked} completions survived, {config.dose.min_train} are needed, "
        f"after {len(verdicts)} generated down to kappa {walk.kappa:.3g} (dose "
        f"{walk.kappa * config.dose.alpha:.3g}); dropped: {listed}."
    )


def _bank(config: LoopConfig, walk: Walk, verdicts: Sequence[Verdict]) -> tuple[Completion, ...]:
    """Every survivor at the walk's dose or above; weaker ones carry less of the trait."""
    least = walk.kappa * config.dose.alpha
    return tuple(
        v.completion for v in verdicts if v.kept and abs(v.completion.dose) >= abs(least) - 1e-9
    )


__all__ = ["Instrument", "Observer", "Recall", "Round", "StarvedError", "baselines", "love"]


_NONE: Mapping[str, Instrument] = MappingProxyType({})


def _silent(event: str, index: int, values: Mapping[str, Any]) -> None:
    """The default observer."""


def _forgetful(event: str, index: int, part: str) -> None:
    """The default recall: every stage is computed."""


def baselines(
    model: HookedTransformer,
    axis: Axis,
    config: LoopConfig | None = None,
    observe: Observer = _silent,
    recall: Recall = _forgetful,
    *,
    instruments: Mapping[str, Instrument] = _NONE,
) -> dict[str, Stage]:
    """Base and both prompted personas, measured like every later stage, without training.

    Args:
        instruments: by name, what else reads each stage (see `love`).

    Returns:
        `base`, `prompted+` and `prompted-`.

    Raises:
        ShlError: a score that is not finite, or a prompt that leaves no room in the context.

    Example:
        >>> from shl.method.axes import load_axis
        >>> from shl.config import EvalConfig, GenerateConfig
        >>> from shl.models.tiny import tiny_gemma
        >>> config = LoopConfig(
        ...     generate=GenerateConfig(max_new_tokens=4), eval=EvalConfig(samples=1)
        ... )
        >>> stages = baselines(tiny_gemma(), load_axis("care_auth"), config)
        >>> stages["base"].coherence
        1.0
    """
    study = Study(model, axis, config or LoopConfig(), observe, recall, instruments)
    personas = {"base": None, "prompted+": axis.positive, "prompted-": axis.negative}
    stages = {}
    for name, persona in personas.items():
        stages[name] = study.stage(-1, name, persona=persona)
        if name == "base":
            remember_base(model, stages[name].evaluation)
    return stages


def love(
    model: HookedTransformer,
    axis: Axis,
    config: LoopConfig | None = None,
    *,
    observe: Observer = _silent,
    recall: Recall = _forgetful,
    instruments: Mapping[str, Instrument] = _NONE,
) -> Iterator[Round]:
    """Run the method round by round; hooks are off between rounds.

    Args:
        instruments: by name, what else reads each stage: called once per stage with the model,
            its hooks on, and the persona or None; `observe` is told as "reading".

    Raises:
        StarvedError: fewer than `min_train` survivors within the batch budget; the sentence says
            how many, at which dose, and which rules dropped the rest.
        ShlError: a setting that does not fit the model.
        NotFiniteError: NaN or infinity; the sentence names stage, round, site and step.

    Example:
        >>> from shl.method.axes import load_axis
        >>> from shl.models.tiny import tiny_gemma
        >>> rounds = love(tiny_gemma(), load_axis("care_auth"))  # nothing has run yet
    """
    config = config or LoopConfig()
    study = Study(model, axis, config, observe, recall, instruments)
    adapters: list[Adapter] = []
    for index in range(config.rounds):
        finished = study.round(index, tuple(adapters))
        adapters.append(finished.adapter)
        yield finished
