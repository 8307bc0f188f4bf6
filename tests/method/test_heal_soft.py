"""The soft target: what a student learns from the steered model's distributions."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import kl_by_hand, log_p_by_hand

from shl.config import HealConfig
from shl.hooks.bake import baked
from shl.hooks.vector import SteeringVector
from shl.method.barrier import Teacher
from shl.method.heal import heal, learnt, train_adapter
from shl.models.generate import generate
from shl.models.scores import completion_hidden
from shl.models.tokens import Prompt, encode
from shl.utils.errors import ShlError

SOFT = HealConfig(rank=4, epochs=1, lr=2e-2, batch_size=3, divergence="none", target="soft")
PROMPTS = ["Tell me about your long and quiet day?", "Hi?", "Why is that so?"]


@pytest.fixture
def texts(gemma):
    return generate(gemma, PROMPTS, max_new_tokens=9, min_new_tokens=5, seed=2)


@pytest.fixture
def teacher(gemma):
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    return Teacher(partial(SteeringVector({1: direction}, "tiny", "demo", 1).steering, gemma, 1.0))


def mean_kl_by_hand(model, texts, teacher, adapters=()):
    """Mean over completions of the mean KL(teacher || student) per token, two full softmaxes."""
    with teacher.steering():
        taught = [log_p_by_hand(model, c) for c in texts]
    with baked(model, adapters):
        own = [log_p_by_hand(model, c) for c in texts]
    kl = [float(kl_by_hand(t, s).mean()) for t, s in zip(taught, own, strict=True)]
    return sum(kl) / len(kl)


def test_the_loss_is_the_mean_kl_of_teacher_to_student(gemma, texts, teacher):
    [step] = train_adapter(gemma, texts, SOFT, teacher=teacher).steps
    assert step.nll == pytest.approx(mean_kl_by_hand(gemma, texts, teacher), abs=1e-5)


def test_training_takes_the_student_to_the_teacher(gemma, texts, teacher):
    before = mean_kl_by_hand(gemma, texts, teacher)
    adapter = heal(gemma, texts, replace(SOFT, epochs=40), teacher=teacher)
    assert mean_kl_by_hand(gemma, texts, teacher, [adapter]) < before / 4


def test_a_teacher_that_is_the_student_leaves_it_alone(gemma, texts):
    healed = train_adapter(gemma, texts, SOFT, teacher=Teacher())
    assert abs(healed.steps[0].nll) < 1e-5
    assert healed.steps[0].grad_nll < 1e-5


def test_the_teacher_does_not_carry_the_new_adapter(gemma, texts, teacher):
    """A resumed training has an adapter that is not the identity any more."""
    config = replace(SOFT, epochs=4)
    states = []
    whole_run = train_adapter(
        gemma, texts, config, teacher=teacher, on_step=lambda s, n, state: states.append(state())
    )
    resumed = train_adapter(gemma, texts, config, teacher=teacher, resume=states[1])
    assert [s.nll for s in resumed.steps] == [s.nll for s in whole_run.steps]


def whole(model, text):
    return learnt(model, text, "all")[0]


def test_all_positions_are_prompt_completion_and_what_follows(gemma, texts):
    text = texts[0]
    ids = (*text.prompt_tokens, *text.tokens)
    made = whole(gemma, text)
    assert (*made.prompt_tokens, *made.tokens)[:-1] == ids
    assert len(made.tokens) == len(ids)


def test_all_positions_change_what_is_learnt(gemma, texts, teacher):
    config = replace(SOFT, positions="all")
    [step] = train_adapter(gemma, texts, config, teacher=teacher).steps
    expected = mean_kl_by_hand(gemma, [whole(gemma, c) for c in texts], teacher)
    assert step.nll == pytest.approx(expected, abs=1e-5)


def test_clip_limits_the_teacher_where_it_is_far_from_the_reference(gemma, texts, teacher):
    plain = mean_kl_by_hand(gemma, texts, teacher)
    for clip, least, most in ((1e6, plain - 1e-5, plain + 1e-5), (plain / 100, 0, plain / 20)):
        [step] = train_adapter(gemma, texts, replace(SOFT, clip=clip), teacher=teacher).steps
        assert least <= step.nll <= most


def test_clip_by_hand(gemma, texts, teacher):
    """g = min(1, sqrt(clip / KL(teacher || base))) of the way in final hidden states."""
    own = completion_hidden(gemma, texts).double()
    with teacher.steering():
        steered = completion_hidden(gemma, texts).double()
    unembed = gemma.W_U.double()
    base = (own @ unembed + gemma.b_U).log_softmax(1)
    far = (steered @ unembed + gemma.b_U).log_softmax(1)
    kl = (far.exp() * (far - base)).sum(1)
    clip = float(kl.median())
    share = (clip / kl).sqrt().clamp(max=1)
    goal = ((own + share[:, None] * (steered - own)) @ unembed + gemma.b_U).log_softmax(1)
    each = (goal.exp() * (goal - base)).sum(1).split([len(c.tokens) for c in texts])
    [step] = train_adapter(gemma, texts, replace(SOFT, clip=clip), teacher=teacher).steps
    assert step.nll == pytest.approx(float(torch.stack([k.mean() for k in each]).mean()), abs=1e-5)


def test_the_barrier_is_that_of_sampled_targets(gemma, texts, teacher):
    config = replace(SOFT, divergence="kl_rev", tau=0.0, epochs=2)
    adapter = heal(gemma, texts, replace(SOFT, epochs=1), teacher=teacher)
    with baked(gemma, [adapter]):
        soft = train_adapter(gemma, texts, config, teacher=teacher).steps[0]
        hard = train_adapter(gemma, texts, replace(config, target="sampled")).steps[0]
    assert soft.d == hard.d > 0
    assert soft.nll != hard.nll


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"target": "sampled", "positions": "all"},
            "positions is 'all', which needs target 'soft'",
        ),
        ({"target": "sampled", "clip": 1.0}, "clip is 1.0, which needs target 'soft'"),
        ({"clip": 0.0}, "clip is 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ShlError, match=message):
        replace(SOFT, **changes)


@pytest.mark.parametrize("target", ["soft", "sampled"])
def test_a_teacher_belongs_to_the_soft_target_alone(gemma, texts, teacher, target):
    given = None if target == "soft" else teacher
    with pytest.raises(ShlError, match="target is"):
        train_adapter(gemma, texts, replace(SOFT, target=target), teacher=given)


def test_the_opposite_sign_cancels_what_both_have_in_common(gemma, texts, teacher):
    """The target is h + (h_plus - h_minus) / 2 in final hidden states."""
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    vector = SteeringVector({1: direction}, "tiny", "demo", 1)
    minus = partial(vector.steering, gemma, -1.0)
    own = completion_hidden(gemma, texts).double()
    with teacher.steering():
        up = completion_hidden(gemma, texts).double()
    with minus():
        down = completion_hidden(gemma, texts).double()
    unembed = gemma.W_U.double()
    goal = ((own + (up - down) / 2) @ unembed + gemma.b_U).log_softmax(1)
    base = (own @ unembed + gemma.b_U).log_softmax(1)
    kl = (goal.exp() * (goal - base)).sum(1).split([len(c.tokens) for c in texts])
    odd = replace(teacher, opposite=minus)
    [step] = train_adapter(gemma, texts, replace(SOFT, odd=True), teacher=odd).steps
    assert step.nll == pytest.approx(float(torch.stack([k.mean() for k in kl]).mean()), abs=1e-5)
    with pytest.raises(ShlError, match=r"odd is False and teacher.opposite is given"):
        train_adapter(gemma, texts, SOFT, teacher=odd)


@pytest.mark.parametrize("positions", ["completion", "all"])
def test_a_teacher_with_a_persona_reads_the_same_tokens_after_it(gemma, texts, positions):
    """Its targets are those of the persona's prompt, at the positions that both prompts share."""
    persona = "You are calm and kind."
    student, read = learnt(gemma, texts[0], positions, persona)
    assert student.tokens == read.tokens
    whole_prompt = encode(gemma, Prompt(PROMPTS[0], persona))
    ids = (*read.prompt_tokens, *read.tokens)
    assert ids[: len(whole_prompt)] == tuple(whole_prompt)
    assert (*student.prompt_tokens, *student.tokens)[:13] == texts[0].prompt_tokens[:13]
    # BOS is the only token before the prompt that both share.
    assert len(student.prompt_tokens) == (1 if positions == "all" else len(texts[0].prompt_tokens))
    config = replace(SOFT, positions=positions)
    [step] = train_adapter(gemma, texts, config, teacher=Teacher(persona=persona)).steps
    pairs = [learnt(gemma, c, positions, persona) for c in texts]
    kl = [
        float(kl_by_hand(log_p_by_hand(gemma, told), log_p_by_hand(gemma, own)).mean())
        for own, told in pairs
    ]
    assert step.nll == pytest.approx(sum(kl) / len(kl), abs=1e-5)


def test_every_third_position_from_another_one_in_each_text(gemma, texts, teacher):
    """The loss is the mean over texts of the mean over the picked positions, by hand; a step in
    parts of one row gives the same."""
    with teacher.steering():
        taught = [log_p_by_hand(gemma, c) for c in texts]
    own = [log_p_by_hand(gemma, c) for c in texts]
    # One batch of three, sorted by length; row i begins at position i.
    order = sorted(range(3), key=lambda i: len(texts[i].prompt_tokens) + len(texts[i].tokens))
    kl = [float(kl_by_hand(taught[i], own[i])[row::3].mean()) for row, i in enumerate(order)]
    for rows in (None, 1):
        config = replace(SOFT, every=3, rows=rows)
        [step] = train_adapter(gemma, texts, config, teacher=teacher).steps
        assert step.nll == pytest.approx(sum(kl) / 3, abs=1e-5)


@pytest.mark.parametrize("positions", ["completion", "all"])
@pytest.mark.parametrize("rows", [None, 1])
def test_a_rewound_text_is_learnt_at_the_dose_of_each_token(gemma, texts, teacher, positions, rows):
    first = len(texts[1].tokens)
    doses = tuple(1.0 - 0.1 * t for t in range(first))
    texts[1] = replace(texts[1], dose=1.0, doses=doses, rewinds=((0, 0.9),))
    config = replace(SOFT, positions=positions, rows=rows)
    [step] = train_adapter(gemma, texts, config, teacher=teacher).steps
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    vector = SteeringVector({1: direction}, "tiny", "demo", 1)
    expected = 0.0
    for c in texts:
        count = len(c.prompt_tokens) + len(c.tokens)
        at = range(1 - len(c.prompt_tokens), 1 + len(c.tokens))
        table = [[doses[min(max(t, 0), first - 1)] for t in at]] if c.doses else [[1.0] * count]
        exact = Teacher(partial(vector.steering, gemma, torch.tensor(table)))
        c = whole(gemma, c) if positions == "all" else c
        expected += mean_kl_by_hand(gemma, [c], exact) / len(texts)
    assert step.nll == pytest.approx(expected, abs=1e-5)
    constant = [replace(c, doses=()) for c in texts]
    [other] = train_adapter(gemma, constant, config, teacher=teacher).steps
    assert abs(other.nll - step.nll) > 1e-4


def test_the_opposite_teacher_of_a_rewound_text_has_its_doses_with_the_other_sign(gemma, texts):
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    vector = SteeringVector({1: direction}, "tiny", "demo", 1)
    made = [replace(c, dose=1.0, doses=(0.6,) * len(c.tokens), rewinds=((0, 0.6),)) for c in texts]
    steps = []
    for dose, given in ((1.0, made), (0.6, texts)):
        plus, minus = (partial(vector.steering, gemma, sign * dose) for sign in (1, -1))
        odd = replace(SOFT, odd=True)
        steps += train_adapter(gemma, given, odd, teacher=Teacher(plus, opposite=minus)).steps
    assert steps[0].nll == pytest.approx(steps[1].nll, abs=1e-6)
