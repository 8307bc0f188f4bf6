"""One round of the method, stage by stage: each is recalled, or computed and observed."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformer_lens import HookedTransformer

from shl.axes import Axis
from shl.bake import baked
from shl.config import LoopConfig
from shl.dose import Walk, after_batch, ladder, settle, start
from shl.filters import Verdict, judge
from shl.finite import named
from shl.generate import Completion, generate, without_persona
from shl.heal import Healed, train_adapter
from shl.lora import Adapter
from shl.random_vector import random_like
from shl.rounds import Instrument, Observer, Recall, Round, StarvedError
from shl.seeds import seed_for
from shl.stages import Stage, measure, sample_texts
from shl.tokens import Prompt
from shl.vector import SteeringVector, extract_vector
from shl.vignettes import evaluate

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
