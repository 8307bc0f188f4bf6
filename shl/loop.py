"""`love`: steer, filter, heal, and again; yields a frozen `Round` at a time.

No files, no printing, no pictures: `observe` is told of every finished stage, so that a caller
can keep what has been computed even if a later stage stops the run.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformer_lens import HookedTransformer

from shl.axes import Axis
from shl.bake import baked
from shl.config import LoopConfig
from shl.dose import Walk, after_batch, settle, start
from shl.errors import ShlError
from shl.filters import Verdict, judge
from shl.generate import Completion, generate
from shl.heal import Healed, train_adapter
from shl.lora import Adapter
from shl.seeds import seed_for
from shl.stages import Stage, measure, sample_texts
from shl.vector import SteeringVector, extract_vector
from shl.vignettes import evaluate

Observer = Callable[[str, int, Mapping[str, Any]], None]
"""Called as `observe(event, round, values)`; round is -1 before the first."""


def _silent(event: str, index: int, values: Mapping[str, Any]) -> None:
    """The default observer."""


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
    observe: Observer = _silent,
) -> dict[str, Stage]:
    """Base and both prompted personas, measured like every later stage, without training.

    Returns:
        `base`, `prompted+` and `prompted-`.

    Raises:
        ShlError: a score that is not finite, or a prompt that leaves no room in the context.

    Example:
        >>> from shl.axes import load_axis
        >>> from shl.config import EvalConfig, GenerateConfig
        >>> from shl.tiny import tiny_gemma
        >>> config = LoopConfig(
        ...     generate=GenerateConfig(max_new_tokens=4), eval=EvalConfig(samples=1)
        ... )
        >>> stages = baselines(tiny_gemma(), load_axis("care_auth"), config)
        >>> stages["base"].coherence
        1.0
    """
    config = config or LoopConfig()
    stages = {}
    for name, persona in (
        ("base", None),
        ("prompted+", axis.positive),
        ("prompted-", axis.negative),
    ):
        stages[name] = measure(model, axis, config, name, persona=persona)
        observe("stage", -1, {"stage": stages[name]})
    return stages


def love(
    model: HookedTransformer,
    axis: Axis,
    config: LoopConfig | None = None,
    *,
    observe: Observer = _silent,
) -> Iterator[Round]:
    """Run the method round by round; hooks are off between rounds.

    Raises:
        StarvedError: fewer than `min_train` survivors within the batch budget; the sentence says
            how many, at which dose, and which rules dropped the rest.
        ShlError: a loss or score that is not finite, or a setting that does not fit the model.

    Example:
        >>> from shl.axes import load_axis
        >>> from shl.tiny import tiny_gemma
        >>> rounds = love(tiny_gemma(), load_axis("care_auth"))  # nothing has run yet
    """
    config = config or LoopConfig()
    adapters: list[Adapter] = []
    for index in range(config.rounds):
        finished = _round(model, axis, config, index, tuple(adapters), observe)
        adapters.append(finished.adapter)
        yield finished


def _round(
    model: HookedTransformer,
    axis: Axis,
    config: LoopConfig,
    index: int,
    before: tuple[Adapter, ...],
    observe: Observer,
) -> Round:
    with baked(model, before):
        vector = extract_vector(
            model,
            axis,
            config.vector.layers,
            contexts=config.vector.contexts,
            batch_size=config.vector.batch_size,
            round=index,
        )
        observe("vector", index, {"vector": vector})
        walk, probes = _probe(model, axis, config, index, vector, observe)
        walk, dreams = _dream(model, axis, config, index, vector, walk, probes, observe)
        kappa = walk.kappa
        dose = kappa * config.dose.alpha
        kept = _bank(config, walk, (*probes, *dreams))
        with vector.steering(model, dose):
            reading = evaluate(model, config=config.eval)
        own = tuple(v for v in (*probes, *dreams) if abs(v.completion.dose - dose) < 1e-9)
        steered = Stage("steered", reading, own)
        observe("stage", index, {"stage": steered, "kappa": kappa, "dose": dose})
        healing = train_adapter(
            model,
            kept,
            config.heal,
            index=index,
            rounds=config.rounds,
            seed=seed_for(config.seed, "heal", index),
            axis=axis.name,
            on_step=lambda step, total: observe("step", index, {"step": step, "total": total}),
        )
        observe("healed", index, {"healing": healing})
    with baked(model, (*before, healing.adapter)):
        healed = measure(model, axis, config, "healed")
    observe("stage", index, {"stage": healed})
    return Round(index, vector, walk, kappa, dose, probes, dreams, kept, healing, steered, healed)


def _probe(
    model: HookedTransformer,
    axis: Axis,
    config: LoopConfig,
    index: int,
    vector: SteeringVector,
    observe: Observer,
) -> tuple[Walk, tuple[Verdict, ...]]:
    """All rungs of the ladder as rows of the same batches; the same prompts at every rung."""
    walk = start(config.dose)
    if not config.dose.walk:
        return walk, ()
    size = config.dose.probe_size
    doses = torch.tensor([k * config.dose.alpha for k in walk.kappas], dtype=torch.float64)
    rows = doses.repeat_interleave(size)
    first = index * size
    prompts = [
        axis.prompts[(first + i) % len(axis.prompts)] for _ in walk.kappas for i in range(size)
    ]
    with vector.steering(model, rows):
        texts = generate(
            model, prompts, **vars(config.generate), seed=seed_for(config.seed, "probe", index)
        )
    verdicts = judge(model, texts, config.filter)
    counts = {
        kappa: (sum(v.kept for v in verdicts[j * size : (j + 1) * size]), size)
        for j, kappa in enumerate(walk.kappas)
    }
    walk = settle(walk, counts)
    observe("probe", index, {"verdicts": verdicts, "walk": walk})
    return walk, tuple(verdicts)


def _dream(
    model: HookedTransformer,
    axis: Axis,
    config: LoopConfig,
    index: int,
    vector: SteeringVector,
    walk: Walk,
    probes: tuple[Verdict, ...],
    observe: Observer,
) -> tuple[Walk, tuple[Verdict, ...]]:
    """Full batches at the walk's dose until enough survive."""
    dreams: list[Verdict] = []
    for batch in range(config.dose.max_batches):
        if len(_bank(config, walk, (*probes, *dreams))) >= config.dose.min_train:
            break
        with vector.steering(model, walk.kappa * config.dose.alpha):
            texts = sample_texts(
                model, axis, config, config.dose.batch_size, ("dream", index, batch)
            )
        verdicts = judge(model, texts, config.filter)
        dreams += verdicts
        survivors = sum(v.kept for v in verdicts)
        walk = after_batch(walk, survivors, len(verdicts))
        observe("batch", index, {"verdicts": verdicts, "walk": walk, "batch": batch})
    banked = len(_bank(config, walk, (*probes, *dreams)))
    if banked < config.dose.min_train:
        everything = (*probes, *dreams)
        dropped = Counter(reason for v in everything for reason in v.reasons)
        listed = ", ".join(f"{name} {count}" for name, count in dropped.most_common())
        raise StarvedError(
            f"round {index}: {banked} completions survived, {config.dose.min_train} are needed, "
            f"after {len(everything)} generated down to kappa {walk.kappa:.3g} (dose "
            f"{walk.kappa * config.dose.alpha:.3g}); dropped: {listed}."
        )
    return walk, tuple(dreams)


def _bank(config: LoopConfig, walk: Walk, verdicts: Sequence[Verdict]) -> tuple[Completion, ...]:
    """Every survivor at the walk's dose or above; weaker ones carry less of the trait."""
    least = walk.kappa * config.dose.alpha
    return tuple(
        v.completion for v in verdicts if v.kept and abs(v.completion.dose) >= abs(least) - 1e-9
    )
