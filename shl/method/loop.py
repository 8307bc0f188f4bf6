"""The method: steer, filter, heal, repeat.

`love` runs it and yields one frozen `Round` at a time. A round extracts a vector from the current
student, probes a ladder of doses, generates steered completions at the highest dose whose text
survives the filter, and trains an adapter on the survivors; the next round starts from the student
with that adapter. This module reads and writes no file: results go to an `Observer` and may come
from it. Random draws are functions of (seed, round, stage, item), so a run that continues from
loaded results ends with the same bits as one that was not interrupted.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from transformer_lens import HookedTransformer

from shl.config import LoopConfig
from shl.hooks.adapter import Adapter
from shl.hooks.bake import baked
from shl.hooks.vector import SteeringVector
from shl.measure.vignettes import evaluate, remember_base
from shl.method.axes import Axis
from shl.method.dose import Walk, after_batch, ladder, settle, start
from shl.method.extract import extract_vector, random_like
from shl.method.filters import Verdict, judge
from shl.method.heal import Healed, train_adapter
from shl.method.stages import Instrument, InstrumentReading, Judged, Observer, Stage
from shl.models.generate import Completion, generate, without_persona
from shl.models.nan_checks import named
from shl.models.tokens import Prompt
from shl.utils.errors import ShlError
from shl.utils.seeds import seed_for

T = TypeVar("T")

MATCHED_ON = 8
"""Prompts on which the random control is matched in divergence [count]."""


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


def baselines(
    model: HookedTransformer,
    axis: Axis,
    config: LoopConfig | None = None,
    *,
    observer: Observer | None = None,
    instruments: Mapping[str, Instrument] | None = None,
) -> dict[str, Stage]:
    """Measure base and both prompted personas like every later stage, without training.

    Args:
        observer: receives each measured stage, and may supply it.
        instruments: by name, what else reads each stage.

    Returns:
        `base`, `prompted+` and `prompted-`.

    Raises:
        ShlError: a score that is not finite, or a prompt that does not fit into the context.

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
    study = Study(model, axis, config or LoopConfig(), observer or Observer(), instruments or {})
    stages = {"base": study.measure(-1, "base")}
    remember_base(model, stages["base"].evaluation)
    for name, persona in (("prompted+", axis.positive), ("prompted-", axis.negative)):
        stages[name] = study.measure(-1, name, persona=persona)
    return stages


def love(
    model: HookedTransformer,
    axis: Axis,
    config: LoopConfig | None = None,
    *,
    observer: Observer | None = None,
    instruments: Mapping[str, Instrument] | None = None,
) -> Iterator[Round]:
    """Run the method round by round; hooks are off between rounds.

    Args:
        observer: receives what each stage produces, and may supply it.
        instruments: by name, what else reads each measured stage.

    Raises:
        StarvedError: fewer than `min_train` survivors within the batch budget; the sentence says
            how many, at which dose, and which rules dropped the rest.
        ShlError: a setting that does not fit the model.
        NotFiniteError: NaN or infinity; the sentence names stage, round, site and step.

    Example:
        >>> from shl.method.axes import load_axis
        >>> from shl.models.tiny import tiny_gemma
        >>> rounds = love(tiny_gemma(), load_axis("care_auth"))  # a generator: nothing has run yet
    """
    config = config or LoopConfig()
    study = Study(model, axis, config, observer or Observer(), instruments or {})
    adapters: list[Adapter] = []
    for index in range(config.rounds):
        finished = study.round(index, tuple(adapters))
        adapters.append(finished.adapter)
        yield finished


@dataclass(frozen=True)
class Study:
    """The stages of a run in the order in which they run, each computed once."""

    model: HookedTransformer
    axis: Axis
    config: LoopConfig
    observer: Observer
    instruments: Mapping[str, Instrument] = field(default_factory=dict)

    @property
    def persona(self) -> str | None:
        """The persona in the prompt while completions are generated."""
        return self.axis.positive if self.config.prompted else None

    def round(self, index: int, before: tuple[Adapter, ...]) -> Round:
        """Steer, filter, heal, and measure the model before and after healing."""
        model = self.model
        with baked(model, before):
            vector = self.extract(index)
            walk, probes = self.probe(index, vector)
            walk, dreams = self.dream(index, vector, walk, probes)
            survivors = _survivors(walk, (*probes, *dreams))
            kept = tuple(without_persona(model, completion) for completion in survivors)
            steered = self.measure_steered(index, vector, walk, (*probes, *dreams))
            healing = self.heal(index, kept)
        with baked(model, (*before, healing.adapter)):
            healed = self.measure(index, "healed")
        kappa, dose = walk.kappa, _dose(walk)
        return Round(
            index, vector, walk, kappa, dose, probes, dreams, kept, healing, steered, healed
        )

    def extract(self, index: int) -> SteeringVector:
        """Extract the round's vector from the student that enters it."""
        return self.once(
            "extracting the vector",
            index,
            load=partial(self.observer.load_vector, index),
            compute=partial(self._extract, index),
            save=partial(self.observer.save_vector, index),
        )

    def _extract(self, index: int) -> SteeringVector:
        settings, config = self.config.vector, self.config
        vector = extract_vector(
            self.model,
            self.axis,
            settings.layers,
            contexts=settings.contexts,
            batch_size=settings.batch_size,
            round=index,
            against=settings.against,
        )
        if settings.direction == "contrast":
            return vector
        # Walks end near the middle of the ladder; at its top the text of both is incoherent.
        kappas = ladder(config.dose)
        return random_like(
            self.model,
            vector,
            self.axis.prompts[:MATCHED_ON],
            dose=kappas[len(kappas) // 2] * config.dose.alpha,
            seed=seed_for(config.seed, "random"),
        )

    def probe(self, index: int, vector: SteeringVector) -> tuple[Walk, tuple[Verdict, ...]]:
        """Try every dose of the ladder on the same prompts, as rows of the same batches."""
        walk = start(self.config.dose)
        if not self.config.dose.walk:
            return walk, ()
        probe = self.once(
            "probing doses",
            index,
            load=partial(self.observer.load_probe, index),
            compute=partial(self._probe, index, vector, walk),
            save=partial(self.observer.save_probe, index),
        )
        return probe.walk, probe.verdicts

    def _probe(self, index: int, vector: SteeringVector, walk: Walk) -> Judged:
        config, size = self.config, self.config.dose.probe_size
        doses = torch.tensor([k * config.dose.alpha for k in walk.kappas], dtype=torch.float64)
        prompts = [
            Prompt(self.axis.prompts[(index * size + i) % len(self.axis.prompts)], self.persona)
            for _ in walk.kappas
            for i in range(size)
        ]
        seed = seed_for(config.seed, "probe", index)
        with vector.steering(self.model, doses.repeat_interleave(size)):
            texts = generate(self.model, prompts, **vars(config.generate), seed=seed)
        verdicts = judge(self.model, texts, config.filter, persona=self.persona)
        counts = {
            kappa: (sum(v.kept for v in verdicts[j * size : (j + 1) * size]), size)
            for j, kappa in enumerate(walk.kappas)
        }
        return Judged(tuple(verdicts), settle(walk, counts))

    def dream(
        self, index: int, vector: SteeringVector, walk: Walk, probes: tuple[Verdict, ...]
    ) -> tuple[Walk, tuple[Verdict, ...]]:
        """Generate full batches at the walk's dose until enough completions survive."""
        settings, verdicts = self.config.dose, probes
        for number in range(settings.max_batches):
            if len(_survivors(walk, verdicts)) >= settings.min_train:
                break
            batch = self.once(
                f"batch {number}",
                index,
                load=partial(self.observer.load_batch, index, number),
                compute=partial(self._batch, index, number, vector, walk),
                save=partial(self.observer.save_batch, index, number),
            )
            walk = batch.walk
            verdicts += batch.verdicts
        _require_enough(index, walk, verdicts)
        return walk, verdicts[len(probes) :]

    def _batch(self, index: int, number: int, vector: SteeringVector, walk: Walk) -> Judged:
        count, key = self.config.dose.batch_size, ("dream", index, number)
        with vector.steering(self.model, _dose(walk)):
            texts = sample_texts(
                self.model, self.axis, self.config, count, key, persona=self.persona
            )
        verdicts = judge(self.model, texts, self.config.filter, persona=self.persona)
        kept = sum(v.kept for v in verdicts)
        return Judged(tuple(verdicts), after_batch(walk, kept, len(verdicts)))

    def measure_steered(
        self, index: int, vector: SteeringVector, walk: Walk, verdicts: Sequence[Verdict]
    ) -> Stage:
        """Measure the student as it made this round's texts, which are its samples."""
        dose = _dose(walk)
        samples = tuple(v for v in verdicts if abs(v.completion.dose - dose) < 1e-9)

        def compute() -> Stage:
            with vector.steering(self.model, dose):
                evaluation = evaluate(self.model, persona=self.persona, config=self.config.eval)
            return Stage("steered", evaluation, samples, walk.kappa, dose)

        return self._measured(
            index, "steered", compute, None, partial(vector.steering, self.model, dose)
        )

    def heal(self, index: int, kept: Sequence[Completion]) -> Healed:
        """Train the round's adapter on the kept completions, or continue its training."""

        def compute() -> Healed:
            return train_adapter(
                self.model,
                kept,
                self.config.heal,
                index=index,
                rounds=self.config.rounds,
                seed=seed_for(self.config.seed, "heal", index),
                axis=self.axis.name,
                resume=self.observer.load_training(index),
                on_step=partial(self.observer.on_step, index),
            )

        return self.once(
            "healing",
            index,
            load=partial(self.observer.load_healed, index),
            compute=compute,
            save=partial(self.observer.save_healed, index),
        )

    def measure(self, index: int, name: str, *, persona: str | None = None) -> Stage:
        """Measure the model with the hooks that are on, without steering."""
        compute = partial(measure, self.model, self.axis, self.config, name, persona=persona)
        return self._measured(index, name, compute, persona, nullcontext)

    def _measured(
        self,
        index: int,
        name: str,
        compute: Callable[[], Stage],
        persona: str | None,
        steering: Callable[[], AbstractContextManager[Any]],
    ) -> Stage:
        """A measured stage, and the readings of every instrument with the same hooks."""
        stage = self.once(
            f"measuring {name}",
            index,
            load=partial(self.observer.load_stage, index, name),
            compute=compute,
            save=partial(self.observer.save_stage, index),
        )

        def read(instrument: str) -> InstrumentReading:
            with steering():
                values = self.instruments[instrument](self.model, persona)
            return InstrumentReading(instrument, name, values)

        for instrument in self.instruments:
            self.once(
                f"reading {instrument}:{name}",
                index,
                load=partial(self.observer.load_reading, index, instrument, name),
                compute=partial(read, instrument),
                save=partial(self.observer.save_reading, index),
            )
        return stage

    def once(
        self,
        what: str,
        index: int,
        *,
        load: Callable[[], T | None],
        compute: Callable[[], T],
        save: Callable[[T], None],
    ) -> T:
        """Return a stage's result: loaded, or else computed and saved."""
        result = load()
        if result is None:
            with named(f"round {index}, {what}" if index >= 0 else what):
                result = compute()
            save(result)
        return result


def measure(
    model: HookedTransformer,
    axis: Axis,
    config: LoopConfig,
    name: str,
    *,
    persona: str | None = None,
) -> Stage:
    """Evaluate the model on the vignettes and sample it, with the hooks that are on."""
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
    """Generate `count` answers to the axis's prompts in turn; `key` separates random draws."""
    prompts = [Prompt(axis.prompts[i % len(axis.prompts)], persona) for i in range(count)]
    return generate(model, prompts, **vars(config.generate), seed=seed_for(config.seed, *key))


def _dose(walk: Walk) -> float:
    return walk.kappa * walk.config.alpha


def _survivors(walk: Walk, verdicts: Sequence[Verdict]) -> tuple[Completion, ...]:
    """Every survivor at the walk's dose or above; weaker ones carry less of the trait."""
    least = abs(_dose(walk)) - 1e-9
    return tuple(v.completion for v in verdicts if v.kept and abs(v.completion.dose) >= least)


def _require_enough(index: int, walk: Walk, verdicts: Sequence[Verdict]) -> None:
    survived, needed = len(_survivors(walk, verdicts)), walk.config.min_train
    if survived >= needed:
        return
    dropped = Counter(reason for v in verdicts for reason in v.reasons)
    listed = ", ".join(f"{name} {count}" for name, count in dropped.most_common())
    raise StarvedError(
        f"round {index}: {survived} completions survived, {needed} are needed, after "
        f"{len(verdicts)} generated down to kappa {walk.kappa:.3g} (dose {_dose(walk):.3g}); "
        f"dropped: {listed}."
    )
