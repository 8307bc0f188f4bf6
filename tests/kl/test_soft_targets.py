"""Cross-entropy to a teacher's distributions, against two full softmaxes in float64."""

import pytest
import torch

from shl.kl import differentiable_nll, forward_kl_and_nll, reverse_kl_and_nll, soft_targets
from shl.utils.errors import ShlError


def case(bias):
    g = torch.Generator().manual_seed(3)
    student, teacher, ref = (torch.randn(6, 8, generator=g) for _ in range(3))
    unembed = torch.randn(8, 2100, generator=g)
    return student, teacher, ref, unembed, torch.randn(2100, generator=g) if bias else None


def kl_in_float64(teacher, student, unembed, bias):
    b = 0 if bias is None else bias.double()
    log_t = (teacher.double() @ unembed.double() + b).log_softmax(1)
    log_p = (student.double() @ unembed.double() + b).log_softmax(1)
    return (log_t.exp() * (log_t - log_p)).sum(1)


@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradient_are_those_of_kl_teacher_student(bias):
    student, teacher, _, unembed, b = case(bias)
    exact = student.double().requires_grad_(True)
    expected = kl_in_float64(teacher, exact, unembed, b)
    weights = torch.arange(1.0, 7.0)
    (gradient,) = torch.autograd.grad((weights * expected).sum(), exact)
    leaf = student.clone().requires_grad_(True)
    got = differentiable_nll(leaf, unembed, soft_targets(teacher, unembed, bias=b), bias=b)
    (found,) = torch.autograd.grad((weights * got).sum(), leaf)
    torch.testing.assert_close(got.double(), expected.detach(), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(found.double(), gradient, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("way", [reverse_kl_and_nll, forward_kl_and_nll])
def test_the_kl_to_the_reference_does_not_depend_on_the_targets(way):
    student, teacher, ref, unembed, _ = case(False)
    hard = torch.zeros(6, dtype=torch.long)
    kl, value = way(student, ref, unembed, soft_targets(teacher, unembed))
    assert torch.equal(kl, way(student, ref, unembed, hard)[0])
    torch.testing.assert_close(
        value.double(), kl_in_float64(teacher, student, unembed, None), atol=2e-5, rtol=1e-5
    )


def test_a_range_of_tokens_and_its_rest_make_the_whole():
    _, teacher, _, unembed, _ = case(False)
    whole = soft_targets(teacher, unembed)
    parts = [soft_targets(teacher[:2], unembed), soft_targets(teacher[2:], unembed)]
    for part, expected in zip(parts, (whole[0:2], whole[2:6]), strict=True):
        torch.testing.assert_close(part.mean_w, expected.mean_w, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(part.offset, expected.offset, atol=1e-5, rtol=1e-5)


def test_a_soft_cap_is_refused():
    _, teacher, _, unembed, _ = case(False)
    with pytest.raises(ShlError, match="soft_cap is 30"):
        soft_targets(teacher, unembed, soft_cap=30.0)
    with pytest.raises(ShlError, match="soft_cap is 30"):
        differentiable_nll(teacher, unembed, soft_targets(teacher, unembed), soft_cap=30.0)
