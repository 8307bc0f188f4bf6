"""The method: steer, filter, heal, repeat.

`love` runs it and yields one frozen `Round` at a time. A round extracts a vector from the current
student, probes a ladder of doses, generates steered completions at the highest dose whose text
survives the filter, and trains an adapter on the survivors (or in mode online on completions that
the student samples, see `shl.method.online`); the next round starts from the student with that
adapter. This module reads and writes no file: results go to an `Observer` and may come
from it. Random draws are functions of (seed, round, stage, item), so a run that continues from
loaded results ends with the same bits as one that was not interrupted.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shl.config import LoopConfig
from shl.hooks.adapter import Adapter, adapter_sites
from shl.hooks.bake import baked
from shl.hooks.sites import check_layers
from shl.hooks.vector import SteeringVector
from shl.measure.continuations import Instrument, conflict_items
from shl.measure.nulls import random_like
from shl.measure.retention import retention, running_text
from shl.measure.vignettes import evaluate, remember_base, vignettes
from shl.method.axes import Axis
from shl.method.backtrack import Backtrack, at_own_doses
from shl.method.barrier import Teacher
from shl.method.dose import Walk, after_batch, ladder, settle, start
from shl.method.extract import extract_configured
from shl.method.filters import Verdict, judge
from shl.method.heal import Healed, learnt, train_adapter
from shl.method.online import require_paraphrases, train_online
from shl.method.stages import (
    InstrumentReading,
    Judged,
    Observer,
    Retained,
    Stage,
    StarvedError,
)
from shl.models.generate import Completion, generate, without_persona
from shl.models.nan_checks import named
from shl.models.tokens import Prompt
from shl.utils.files import texts_in
from shl.utils.model import Model
from shl.utils.seeds import seed_for

MATCHED_ON = 8
"""Prompts on which the random control is matched in divergence [count]."""
READ = 3
"""Texts of each source on which retention is read [count]."""
SHOWN = 8
"""Largest number of samples of the negative persona [count]."""
OF_BASE = 2
"""How many times as many samples base has as another stage: all are compared with it."""


@dataclass(frozen=True)
class Round:
    """Results of one round.

    `probes` are the judged completions of the dose ladder, `dreams` those of the full batches at
    `kappa`; the adapter was trained on `kept`, which is empty online. `retained` is what the healed
    student has of the teacher's shift, on training texts, weaker survivors, its own answers and
    instruments' items.

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
    retained: Retained

    @property
    def adapter(self) -> Adapter:
        """The round's frozen adapter."""
        return self.healing.adapter


def baselines(
    model: Model,
    axis: Axis,
    config: LoopConfig | None = None,
    *,
    observer: Observer | None = None,
    instruments: Mapping[str, Instrument] | None = None,
) -> dict[str, Stage]:
    """Measure base and both prompted personas like every later stage, without training.

    Args:
        observer: receives each measured stage, and may supply it.
        instruments: further measurements of each stage, by name.

    Returns:
        `base`, `prompted+` and `prompted-`.

    Raises:
        ShlError: a score is not finite, or a prompt does not fit into the context.

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
    model: Model,
    axis: Axis,
    config: LoopConfig | None = None,
    *,
    observer: Observer | None = None,
    instruments: Mapping[str, Instrument] | None = None,
) -> Iterator[Round]:
    """Run the method round by round; hooks are off between rounds.

    Args:
        observer: receives what each stage produces, and may supply it.
        instruments: further measurements of each measured stage, by name.

    Raises:
        StarvedError: fewer than `min_train` completions survive within `max_batches`.
        ShlError: a setting does not fit the model.
        NotFiniteError: a value is NaN or infinite.

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


def require_fits(model: Model, config: LoopConfig) -> None:
    """Raise a `ShlError` at the first setting that does not fit the model."""
    check_layers(model, config.vector.layers or ())
    adapter_sites(model, config.heal)


@dataclass(frozen=True)
class Study:
    """The stages of a run in the order in which they run; what the observer has is not computed."""

    model: Model
    axis: Axis
    config: LoopConfig
    observer: Observer
    instruments: Mapping[str, Instrument]

    def __post_init__(self) -> None:
        require_fits(self.model, self.config)
        require_paraphrases(self.axis, self.config)

    @property
    def persona(self) -> str | None:
        """The persona in the prompt while completions are generated."""
        return self.axis.positive if self.config.prompted else None

    @property
    def online(self) -> bool:
        """Whether the student samples what it is trained on."""
        return self.config.mode == "online"

    def round(self, index: int, before: tuple[Adapter, ...]) -> Round:
        """Steer, filter, heal, and measure the model before and after healing."""
        model = self.model
        with baked(model, before):
            vector = self.extract(index)
            walk, probes = self.probe(index, vector)
            walk, dreams = self.dream(index, vector, walk, probes)
            survivors = () if self.online else _survivors(walk, (*probes, *dreams))
            kept = tuple(without_persona(model, completion) for completion in survivors)
            steered = self.measure_steered(index, vector, walk, (*probes, *dreams))
            healing = self.heal(index, kept, vector, walk)
        with baked(model, (*before, healing.adapter)):
            healed = self.measure(index, "healed")
        both = (*before, healing.adapter)
        held_out = [v.completion for v in probes if v.kept and v.completion not in survivors]
        sources = {"training": kept, "held out": held_out, "answers": _texts(healed.samples)}
        retained = self.retain(index, sources, self.teacher(vector, walk.dose), before, both)
        kappa, dose = walk.kappa, walk.dose
        return Round(
            index,
            vector,
            walk,
            kappa,
            dose,
            probes,
            dreams,
            kept,
            healing,
            steered,
            healed,
            retained,
        )

    def extract(self, index: int) -> SteeringVector:
        """Extract the round's vector from the student that enters it."""
        vector = self.observer.load_vector(index)
        if vector is not None:
            return vector
        config, settings = self.config, self.config.vector
        with named(f"round {index}, extracting the vector"):
            vector = extract_configured(
                self.model, self.axis, settings, seed=config.seed, round=index
            )
            if settings.direction == "random":
                # Walks end near the middle of the ladder; at its top both texts are incoherent.
                kappas = ladder(config.dose)
                vector = random_like(
                    self.model,
                    vector,
                    self.axis.prompts[:MATCHED_ON],
                    dose=kappas[len(kappas) // 2] * config.dose.alpha,
                    seed=seed_for(config.seed, "random"),
                )
        self.observer.save_vector(index, vector)
        return vector

    def probe(self, index: int, vector: SteeringVector) -> tuple[Walk, tuple[Verdict, ...]]:
        """Try every dose of the ladder on the same prompts, as rows of the same batches."""
        walk, size = start(self.config.dose), self.config.dose.probe_size
        if not self.config.dose.walk:
            return walk, ()
        probe = self.observer.load_probe(index)
        if probe is None:
            doses = torch.tensor(walk.kappas, dtype=torch.float64) * self.config.dose.alpha
            prompts = _prompts(self.axis, self.persona, size, first=index * size) * len(doses)
            key = ("probe", index)
            with named(f"round {index}, probing doses"):
                verdicts = self._generate(vector, doses.repeat_interleave(size), prompts, key)
            kept = [
                sum(v.kept for v in verdicts[i : i + size]) for i in range(0, len(prompts), size)
            ]
            counts = {kappa: (n, size) for kappa, n in zip(walk.kappas, kept, strict=True)}
            probe = Judged(verdicts, settle(walk, counts))
            self.observer.save_probe(index, probe)
        return probe.walk, probe.verdicts

    def dream(
        self, index: int, vector: SteeringVector, walk: Walk, probes: tuple[Verdict, ...]
    ) -> tuple[Walk, tuple[Verdict, ...]]:
        """Generate full batches at the walk's dose until enough completions survive.

        Raises:
            StarvedError: too few survive in `max_batches`.
        """
        settings, verdicts = self.config.dose, probes
        # Online nothing is trained on them; one shows that the dose can be survived.
        needed = 1 if self.online else settings.min_train
        for number in range(settings.max_batches):
            if len(_survivors(walk, verdicts)) >= needed:
                break
            batch = self.observer.load_batch(index, number)
            if batch is None:
                prompts = _prompts(self.axis, self.persona, settings.batch_size)
                key = ("dream", index, number)
                with named(f"round {index}, batch {number}"):
                    judged = self._generate(vector, walk.dose, prompts, key, settings.backtrack)
                kept = sum(v.kept for v in judged)
                batch = Judged(judged, after_batch(walk, kept, len(judged)))
                self.observer.save_batch(index, number, batch)
            walk = batch.walk
            verdicts += batch.verdicts
        survived = len(_survivors(walk, verdicts))
        if survived < needed:
            dropped = Counter(reason for v in verdicts for reason in v.reasons)
            listed = ", ".join(f"{name} {count}" for name, count in dropped.most_common())
            raise StarvedError(
                f"round {index}: {survived} completions survived, {needed} are needed, "
                f"after {len(verdicts)} generated down to kappa {walk.kappa:.3g} (dose "
                f"{walk.dose:.3g}); dropped: {listed}."
            )
        return walk, verdicts[len(probes) :]

    def _generate(
        self,
        vector: SteeringVector,
        dose: float | Tensor,
        prompts: Sequence[Prompt],
        key: Sequence[int | str],
        backtracks: bool = False,
    ) -> tuple[Verdict, ...]:
        """Generate steered completions and judge them without steering."""
        # The ladder's texts never backtrack: their survival is that of their dose.
        backtrack = Backtrack(filter=self.config.filter) if backtracks else None
        sampling = vars(self.config.generate) | {"seed": seed_for(self.config.seed, *key)}
        with vector.steering(self.model, dose):
            texts = generate(self.model, prompts, **sampling, backtrack=backtrack)
        config = self.config.filter
        return tuple(judge(self.model, texts, config, persona=self.persona, reuse_nll=True))

    def measure_steered(
        self, index: int, vector: SteeringVector, walk: Walk, verdicts: Sequence[Verdict]
    ) -> Stage:
        """Measure the steered student, with the round's completions at its dose as the samples."""
        samples = tuple(v for v in verdicts if abs(v.completion.dose - walk.dose) < 1e-9)

        def compute() -> Stage:
            evaluation = evaluate(self.model, persona=self.persona, config=self.config.eval)
            return Stage("steered", evaluation, samples, walk.kappa, walk.dose)

        steering = partial(vector.steering, self.model, walk.dose)
        return self._measured(index, "steered", compute, self.persona, steering)

    def heal(
        self, index: int, kept: Sequence[Completion], vector: SteeringVector, walk: Walk
    ) -> Healed:
        """Train the round's adapter, or continue its training: on the kept completions, or online
        on those that it samples.

        With the soft target the teacher is the student as it wrote the completions, and texts of
        the student without steering and persona are added.
        """
        healed, settings = self.observer.load_healed(index), self.config.heal
        if healed is None:
            resume = self.observer.load_training(index)
            on_step = partial(self.observer.on_step, index)
            with named(f"round {index}, healing"):
                if self.online:
                    healed = train_online(
                        self.model,
                        self.axis,
                        vector,
                        walk.dose,
                        self.config,
                        index=index,
                        resume=resume,
                        on_step=on_step,
                    )
                else:
                    soft = settings.target == "soft"
                    healed = train_adapter(
                        self.model,
                        (*kept, *self.own_texts(index)),
                        settings,
                        index=index,
                        rounds=self.config.rounds,
                        seed=seed_for(self.config.seed, "heal", index),
                        axis=self.axis.name,
                        teacher=self.teacher(vector, walk.dose) if soft else None,
                        resume=resume,
                        on_step=on_step,
                    )
            self.observer.save_healed(index, healed)
        return healed

    def teacher(self, vector: SteeringVector, dose: float) -> Teacher:
        """The student that enters the round, as it wrote the completions."""
        plus, minus = (partial(vector.steering, self.model, x) for x in (dose, -dose))
        return Teacher(plus, self.persona, minus if self.config.heal.odd else None)

    def own_texts(self, index: int) -> list[Completion]:
        """Texts of the student without steering and persona, sampled from its whole distribution:
        answers to the axis's prompts, and running text from neutral openings."""
        settings, openings = self.config.heal, texts_in("openings.toml", "openings")
        starts = (openings[i % len(openings)] for i in range(settings.narrative))
        prompts = [Prompt(text, plain=True) for text in starts]
        sampling = vars(self.config.generate) | {"top_k": 0, "top_p": 1.0}
        seed = seed_for(self.config.seed, "own", index)
        answers = _prompts(self.axis, None, settings.unsteered)
        return generate(self.model, [*answers, *prompts], **sampling, seed=seed)

    def retain(
        self,
        index: int,
        sources: Mapping[str, Sequence[Completion]],
        teacher: Teacher,
        before: tuple[Adapter, ...],
        after: tuple[Adapter, ...],
    ) -> Retained:
        """Read the share of the teacher's shift that the healed student has, by source."""
        found = self.observer.load_retention(index)
        if found is None:
            model, cloze = self.model, self.axis.cloze
            items = {
                "vignettes": [v.text for v in vignettes()],
                "conflicts": [item.text(("order", 0, None)) for item in conflict_items()],
                "cloze": list(cloze.openings if cloze else ()),
            }
            texts = {
                name: [running_text(model, text) for text in items[name][:READ]] for name in items
            }
            texts |= {name: [c for c in given if c.tokens] for name, given in sources.items()}

            @contextmanager
            def steered(given: Sequence[Completion]) -> Iterator[None]:
                with teacher.steering(), at_own_doses(model, given):
                    yield

            names = [name for name, given in texts.items() for _ in given[:READ]]
            with named(f"round {index}, reading retention"):
                each = retention(
                    model,
                    [
                        learnt(model, without_persona(model, c), "completion", teacher.persona)
                        for given in texts.values()
                        for c in given[:READ]
                    ],
                    entered=partial(baked, model, before),
                    steering=steered,
                    student=partial(baked, model, after),
                )
            found = each.by_source(names)
            self.observer.save_retention(index, found)
        return found

    def measure(self, index: int, name: str, *, persona: str | None = None) -> Stage:
        """Measure the model with the hooks that are on, without steering."""
        compute = partial(measure, self.model, self.axis, self.config, name, persona=persona)
        return self._measured(index, name, compute, persona)

    def _measured(
        self,
        index: int,
        name: str,
        compute: Callable[[], Stage],
        persona: str | None,
        steering: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Stage:
        """A measured stage, and the readings of every instrument with the same hooks."""
        where = f"round {index}, " if index >= 0 else ""
        stage = self.observer.load_stage(index, name)
        if stage is None:
            with named(f"{where}measuring {name}"), steering():
                stage = compute()
            self.observer.save_stage(index, stage)
        for instrument, read in self.instruments.items():
            if self.observer.load_reading(index, instrument, name) is None:
                with named(f"{where}reading {instrument}:{name}"), steering():
                    reading = InstrumentReading(instrument, name, read(self.model, persona))
                self.observer.save_reading(index, reading)
        return stage


def measure(
    model: Model,
    axis: Axis,
    config: LoopConfig,
    name: str,
    *,
    persona: str | None = None,
) -> Stage:
    """Evaluate the model on the vignettes and sample it, with the hooks that are on."""
    evaluation = evaluate(model, persona=persona, config=config.eval)
    count = config.eval.samples * (OF_BASE if name == "base" else 1)
    most = {axis.positive: config.eval.persona_samples, axis.negative: SHOWN}
    count = min(count, most.get(persona or "", count))
    # Every stage answers the same prompts with the same draws.
    prompts, seed = _prompts(axis, persona, count), seed_for(config.seed, "sample")
    texts = generate(model, prompts, **vars(config.generate), seed=seed)
    verdicts = judge(model, texts, config.filter, persona=persona, reuse_nll=True)
    return Stage(name, evaluation, tuple(verdicts))


def _prompts(axis: Axis, persona: str | None, count: int, first: int = 0) -> list[Prompt]:
    """`count` of the axis's prompts in turn, from number `first`."""
    texts = axis.prompts
    return [Prompt(texts[i % len(texts)], persona) for i in range(first, first + count)]


def _texts(verdicts: Sequence[Verdict]) -> list[Completion]:
    return [v.completion for v in verdicts]


def _survivors(walk: Walk, verdicts: Sequence[Verdict]) -> tuple[Completion, ...]:
    """Every survivor at the walk's dose or above; weaker ones carry less of the trait."""
    least = abs(walk.dose) - 1e-9
    return tuple(v.completion for v in verdicts if v.kept and abs(v.completion.dose) >= least)
