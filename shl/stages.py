"""One model measured: the probe, and free samples with their verdicts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformer_lens import HookedTransformer

from shl.axes import Axis
from shl.config import LoopConfig
from shl.evaluation import Evaluation
from shl.filters import Verdict, judge
from shl.generate import Completion, generate
from shl.seeds import seed_for
from shl.tokens import Prompt
from shl.vignettes import evaluate


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
