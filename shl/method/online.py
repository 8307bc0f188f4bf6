"""On-policy training: every step samples completions from the current student.

With the objective "teacher" the loss is

    mean over completions of [ mean_t KL(student || teacher)_t + lam * relu(D - tau) ],

where the teacher is the current student with the steering vector on, reading the same tokens
(on-policy distillation: Agarwal et al. 2023, arXiv:2306.13649; Gu et al. 2023, arXiv:2306.08543).
No gradient passes through sampling. The teacher moves on with the student, so it has a small dose,
and the barrier sets how far both move.

With the objective "reward" each prompt has a group of completions, half of them at dose 0 and the
others steered, and the first term is replaced by

    - advantage * sum_t min(ratio_t, cap) log p_student(x_t) / max_new_tokens,

where the advantage is a completion's reward less the mean of its group (without division by the
deviation or by the length: Liu et al. 2025, "Understanding R1-Zero-like training",
arXiv:2503.20783). ratio_t = p_student(x_t) / p_steered(x_t) is constant in the gradient, and 1 for
completions at dose 0. Steered completions with a negative advantage are left out: the student need
not unlearn what it does not write. The reward is

    trait - relu(log perplexity - log limit) - penalty * (dropped by the filter),

where the trait is the mean over tokens of log p0(x | persona) - log p0(x | opposite persona) under
base, for paraphrases of the personas, which nothing else reads.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from shl.config import LoopConfig
from shl.hooks.handle import suspended
from shl.hooks.vector import SteeringVector
from shl.method.axes import Axis
from shl.method.barrier import Barrier, Teacher
from shl.method.extract import extract_configured
from shl.method.filters import Verdict, judge
from shl.method.heal import Healed, OnStep, Trainer, Training, learnt
from shl.method.stages import StarvedError
from shl.models.generate import Completion, generate
from shl.models.nan_checks import named
from shl.models.scores import token_nll
from shl.models.tokens import Prompt, encode
from shl.utils.errors import ShlError, require
from shl.utils.model import Model
from shl.utils.seeds import generator_for, seed_for
from shl.utils.shapes import PerToken

WHOLE = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
"""Sampling from the whole distribution."""


def train_online(
    model: Model,
    axis: Axis,
    vector: SteeringVector,
    dose: float,
    config: LoopConfig,
    *,
    index: int = 0,
    resume: Training | None = None,
    on_step: OnStep | None = None,
) -> Healed:
    """Train a fresh adapter for `config.online.every` steps, with the hooks that are on the model.

    Args:
        vector: that of the student which enters the round; after every `refresh` steps it is
            extracted anew with the adapter on, unless it is random.
        dose: the largest one of the groups, of which the teacher has its share [multiples of the
            vector].
        index: round, for the schedule of lam and the random draws.
        resume: a state that `on_step` received from the same call in an earlier process; training
            continues from there and ends with the same bits.

    Raises:
        StarvedError: too few of the student's completions pass the filter.
        ShlError: D is far above tau, a value is not finite, or the reward lacks paraphrases.

    Example:
        >>> from shl.config import GenerateConfig, HealConfig, OnlineConfig, VectorConfig
        >>> from shl.method.axes import load_axis
        >>> from shl.models.tiny import tiny_gemma
        >>> model, axis = tiny_gemma(), load_axis("love")
        >>> config = LoopConfig(
        ...     vector=VectorConfig(contexts=4),
        ...     generate=GenerateConfig(max_new_tokens=8, min_new_tokens=8),
        ...     heal=HealConfig(rank=2),
        ...     online=OnlineConfig(every=2, prompts=2, min_survival=0),
        ... )
        >>> vector = extract_configured(model, axis, config.vector, seed=config.seed)
        >>> len(train_online(model, axis, vector, 0.5, config).steps)
        2
    """
    require_paraphrases(axis, config)
    settings, heal = config.online, config.heal
    trainer = Trainer(
        model,
        heal,
        index=index,
        rounds=config.rounds,
        seed=seed_for(config.seed, "heal", index),
        axis=axis.name,
    )
    judged = torch.zeros(2)  # completions that were kept, and all
    if resume is not None:
        names = {layer: f"vector.{layer}" for layer in vector.directions}
        trainer.restore(resume, STATE, ["judged", *names.values()])
        judged = resume.tensors["judged"]
        found = {k: resume.tensors[names[k]].to(v.device) for k, v in vector.directions.items()}
        vector = replace(vector, directions=found)
    with trainer.adapter.attach(model) as handle:
        for step in range(len(trainer.log), settings.every):
            anew = step % settings.refresh == 0
            with named(f"step {step}"):
                if anew and step and config.vector.direction == "contrast":
                    vector = extract_configured(
                        model, axis, config.vector, seed=config.seed, round=index
                    )
                batch = _batch(model, axis, vector, dose, config, (index, step))
                kept = [v.kept for v in batch.verdicts]
                judged = judged + torch.tensor([float(sum(kept)), float(len(kept))])
                where = f"round {index}, step {step}"
                _require_fed(batch, judged, settings.min_survival, where)
                persona, teacher = axis.positive if config.prompted else None, None
                if settings.objective == "teacher":
                    pushed = settings.share * dose
                    plus, minus = (partial(vector.steering, model, x) for x in (pushed, -pushed))
                    teacher = Teacher(plus, persona, minus if heal.odd else None)
                pairs = [learnt(model, c, "completion", persona) for c in batch.texts]
                barrier = Barrier(
                    model,
                    trainer.adapter,
                    handle,
                    [[student for student, _ in pairs]],
                    heal,
                    fired=trainer.log[-1].fired if trainer.log else 1.0,
                    teacher=teacher,
                    read=[[read for _, read in pairs]],
                    on_policy=True,
                    weights=() if batch.weights is None else (batch.weights,),
                )
                epoch = step // settings.refresh
                trainer.step(barrier, 0, epoch, settings.every, batch.reward)
                _require_near(trainer, config, where)
            if on_step is not None:
                more = {f"vector.{layer}": v for layer, v in vector.directions.items()}
                state = partial(trainer.state, STATE, {**more, "judged": judged})
                on_step(trainer.log[-1], settings.every, state)
    return Healed(trainer.adapter.frozen(), tuple(trainer.log), heal)


STATE = "online"
"""In place of a digest of texts, of which there is no fixed set."""


def require_paraphrases(axis: Axis, config: LoopConfig) -> None:
    """Raise a `ShlError` if the reward is asked for on an axis without paraphrases."""
    rewarded = config.mode == "online" and config.online.objective == "reward"
    require(
        bool(axis.paraphrases) or not rewarded,
        f"axis {axis.name!r} has no paraphrases of its personas, which the objective 'reward' "
        "needs.",
    )


@dataclass(frozen=True, eq=False)
class _Batch:
    """Completions to train on, each with a token; the verdicts of those that were judged."""

    texts: Sequence[Completion]
    verdicts: Sequence[Verdict]
    weights: PerToken | None = None
    reward: float | None = None


def _batch(
    model: Model,
    axis: Axis,
    vector: SteeringVector,
    dose: float,
    config: LoopConfig,
    key: tuple[int, int],
) -> _Batch:
    """Sample the completions of a step, given by round and number."""
    settings, seed = config.online, seed_for(config.seed, "online", *key)
    order = torch.randperm(len(axis.prompts), generator=generator_for(seed, "prompts")).tolist()
    drawn = [axis.prompts[order[i % len(order)]] for i in range(settings.groups)]
    sampling = vars(config.generate) | WHOLE
    if settings.objective == "teacher":
        texts = generate(model, drawn, **sampling, seed=seed)
        due = key[1] % settings.refresh == 0
        verdicts = judge(model, texts, config.filter) if due else []
        return _Batch([c for c in texts if c.tokens], verdicts)
    half, rows = settings.rows // 2, settings.rows
    ladder = [0.0] * half + [dose * (i + 1) / (rows - half) for i in range(rows - half)]
    doses = torch.tensor(ladder * len(drawn), dtype=torch.float64)
    with vector.steering(model, doses):
        texts = generate(model, [p for p in drawn for _ in ladder], **sampling, seed=seed)
    verdicts = judge(model, texts, config.filter)
    found = np.array(rewards(model, axis, verdicts, config, paraphrase=key[1]))
    groups = found.reshape(-1, rows)
    advantage = (groups - groups.mean(1, keepdims=True)).ravel()
    used = [i for i, c in enumerate(texts) if c.tokens and (doses[i] == 0 or advantage[i] > 0)]
    ratios = _ratios(model, vector, [texts[i] for i in used], config)
    scale = len(used) / len(texts) / config.generate.max_new_tokens
    weights = [
        # The barrier's mean over a completion's tokens divides by their number.
        float(advantage[i]) * scale * len(texts[i].tokens) * ratio
        for i, ratio in zip(used, ratios, strict=True)
    ]
    kept = [texts[i] for i in used]
    return _Batch(kept, verdicts, torch.cat(weights) if weights else None, float(found.mean()))


def rewards(
    model: Model,
    axis: Axis,
    verdicts: Sequence[Verdict],
    config: LoopConfig,
    *,
    paraphrase: int = 0,
) -> list[float]:
    """The reward of each judged completion [nats per token, and the penalty].

    Args:
        paraphrase: number of the pair of paraphrased personas; after the last comes the first.
    """
    settings, pair = config.online, axis.paraphrases[paraphrase % len(axis.paraphrases)]
    texts = [v.completion for v in verdicts]
    traits = trait_scores(model, texts, pair, batch_size=config.filter.batch_size)
    return [
        trait
        - settings.penalty * (not v.kept)
        # A completion without tokens has no perplexity, and is dropped as too short.
        - (max(0.0, math.log(v.perplexity / settings.perplexity)) if v.completion.tokens else 0.0)
        for v, trait in zip(verdicts, traits, strict=True)
    ]


def trait_scores(
    model: Model,
    completions: Sequence[Completion],
    personas: tuple[str, str],
    *,
    batch_size: int = 16,
) -> list[float]:
    """Mean over each completion's tokens of log p(x | persona) - log p(x | opposite persona) under
    base, all handles suspended; nats per token, 0 without tokens.

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> texts = generate(tiny_gemma(), ["Hello?"], max_new_tokens=3, min_new_tokens=3)
        >>> trait_scores(tiny_gemma(), texts, ("Be kind.", "Be kind."))
        [0.0]
    """
    losses = []
    for persona in personas:
        asked = []
        for c in completions:
            prompt = Prompt(c.prompt.text, persona)
            asked.append(replace(c, prompt=prompt, prompt_tokens=tuple(encode(model, prompt))))
        with suspended(model):
            losses.append(token_nll(model, asked, batch_size=batch_size))
    return [
        float((opposite - own).mean()) if len(own) else 0.0
        for own, opposite in zip(*losses, strict=True)
    ]


def _ratios(
    model: Model, vector: SteeringVector, texts: Sequence[Completion], config: LoopConfig
) -> list[Tensor]:
    """min(p_student / p_steered, cap) of each token; 1 for completions at dose 0."""
    ratios = [torch.ones(len(c.tokens)) for c in texts]
    steered = [i for i, c in enumerate(texts) if c.dose != 0]
    if not steered:
        return ratios
    chosen, size = [texts[i] for i in steered], config.filter.batch_size
    student = token_nll(model, chosen, batch_size=size)
    doses = torch.tensor([c.dose for c in chosen], dtype=torch.float64)
    with vector.steering(model, doses):
        behaviour = token_nll(model, chosen, batch_size=size)
    for i, own, other in zip(steered, student, behaviour, strict=True):
        ratios[i] = (other - own).exp().clamp(max=config.online.ratio_cap)
    return ratios


def _require_fed(batch: _Batch, judged: Tensor, least: float, where: str) -> None:
    """Raise a `StarvedError` if too few completions of the round passed the filter."""
    kept, total = map(int, judged.tolist())
    if batch.texts and kept >= least * total:
        return
    dropped = Counter(reason for v in batch.verdicts for reason in v.reasons)
    listed = ", ".join(f"{name} {count}" for name, count in dropped.most_common())
    raise StarvedError(
        f"{where}: {kept} of {total} completions of the student passed the filter and "
        f"{len(batch.texts)} of the last have a token, at least {least:.0%} must pass; dropped "
        f"last: {listed or 'none'}."
    )


def _require_near(trainer: Trainer, config: LoopConfig, where: str) -> None:
    """Raise a `ShlError` if the mean D of the latest steps is far above tau."""
    settings, tau = config.online, max(config.heal.tau, 0.1)
    last = [step.d for step in trainer.log[-settings.refresh :]]
    d, limit = sum(last) / len(last), settings.max_d * tau
    if len(last) == settings.refresh and d > limit:
        raise ShlError(
            f"{where}: the student has diverged: D is {d:.3g} nats on average over {len(last)} "
            f"steps, it must be at most {limit:.3g}; lower the learning rate or the dose."
        )
