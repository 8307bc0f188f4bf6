"""The share of a teacher's logit shift that a student has, and its cosine."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from helpers import random_adapter

from shl.hooks.bake import baked
from shl.hooks.handle import handles_on
from shl.hooks.vector import SteeringVector
from shl.measure.retention import Retention, fisher_products, retention, running_text
from shl.models.generate import generate


def vector(scale=1.0, seed=0):
    direction = torch.randn(32, generator=torch.Generator().manual_seed(seed))
    return SteeringVector({1: scale * direction}, "tiny", "demo", 1)


@pytest.fixture
def pairs(gemma):
    texts = generate(gemma, ["Hi?", "Why?"], max_new_tokens=6, min_new_tokens=6, seed=1)
    return [(c, c) for c in texts]


def read(gemma, pairs, *, student, entered=nullcontext, dose=1.0):
    def steering(texts):
        assert [c.prompt_tokens for c in texts] == [c.prompt_tokens for _, c in pairs]
        return vector().steering(gemma, dose)

    return retention(gemma, pairs, entered=entered, steering=steering, student=student)


def test_by_hand_on_two_tokens():
    # p = (0.5, 0.5), u_t = (2, 0), u_s = (0, 3): Cov(u_t, u_t) = 1, Cov(u_s, u_t) = -1.5,
    # Cov(u_s, u_s) = 2.25.
    h = torch.zeros(1, 2)
    found = fisher_products(h, h, torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]]), EYE)
    assert found[0].tolist() == pytest.approx([1.0, -1.5, 2.25])
    whole = Retention(*(tuple(column) for column in found.T.tolist()))
    assert (whole.share, whole.cosine) == pytest.approx((-1.5, -1.0))


EYE = torch.eye(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_metric_is_that_of_base_and_shifts_are_those_from_the_student_that_entered(dtype):
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(4, 40, 8, generator=generator)
    unembed, bias = torch.randn(8, 50, generator=generator), torch.randn(50, generator=generator)
    base, entered, teacher, student = states.to(dtype)
    unembed = unembed.to(dtype)
    found = fisher_products(base, entered, teacher, student, unembed, bias=bias)
    p = (base.double() @ unembed.double() + bias).softmax(1)
    for k, (a, b) in enumerate([(teacher, teacher), (student, teacher), (student, student)]):
        u, w = ((x.double() - entered.double()) @ unembed.double() for x in (a, b))
        covariance = (p * u * w).sum(1) - (p * u).sum(1) * (p * w).sum(1)
        assert torch.allclose(found[:, k].double(), covariance, rtol=1e-4, atol=1e-4)


def test_a_student_that_is_the_teacher_has_all_and_base_has_nothing(gemma, pairs):
    same = read(gemma, pairs, student=partial(vector().steering, gemma, 1.0))
    assert (same.share, same.cosine) == pytest.approx((1.0, 1.0))
    stayed = read(gemma, pairs, student=nullcontext)
    assert stayed.share == 0.0
    assert stayed.student == (0.0, 0.0)
    other = read(gemma, pairs, student=partial(vector(seed=1).steering, gemma, 1.0))
    assert abs(other.cosine) < 0.9


def test_shifts_of_a_later_round_begin_at_the_student_that_entered(gemma, pairs):
    adapter = random_adapter(gemma, ("q", "down"), (0, 2))
    entered = partial(baked, gemma, [adapter])
    still = read(gemma, pairs, student=entered, entered=entered)
    assert still.share == pytest.approx(0.0, abs=1e-5)
    assert min(still.teacher) > 0


def test_handles_on_the_model_do_not_act(gemma, pairs):
    student = partial(vector().steering, gemma, 0.5)
    before = read(gemma, pairs, student=student)
    with vector(5.0, seed=4).steering(gemma, 1.0):
        assert read(gemma, pairs, student=student) == before
    assert not handles_on(gemma)


def test_the_first_tokens_of_a_long_text_are_read(gemma, pairs, monkeypatch):
    student = partial(vector().steering, gemma, 0.5)
    whole = read(gemma, pairs, student=student)
    monkeypatch.setattr("shl.measure.retention.MOST", 2)
    part = read(gemma, pairs, student=student)
    assert all(0 < a < b for a, b in zip(part.teacher, whole.teacher, strict=True))


def test_running_text_is_a_completion_of_its_first_word(gemma):
    text = running_text(gemma, "Today I feel")
    assert (text.prompt.plain, text.text) == (True, " I feel")
    assert text.prompt_tokens[0] == gemma.tokenizer.bos_token_id
    assert gemma.tokenizer.decode([*text.prompt_tokens[1:], *text.tokens]) == "Today I feel"
