"""Vectors are added, scaled and projected, with the numbers written out."""

import pytest
import torch
from helpers import tokens_of

from shl.hooks.vector import SteeringVector
from shl.method.axes import load_axis
from shl.method.extract import extract_vector, first_component, mean_difference
from shl.models.tiny import tiny_gemma
from shl.utils.errors import ShlError


def vector(axis="a", model="m", **directions):
    layers = {int(k[1:]): torch.tensor(v) for k, v in directions.items()}
    return SteeringVector(layers, model, axis, 8)


def as_lists(v):
    return {layer: x.tolist() for layer, x in v.directions.items()}


def test_sum_has_the_layers_of_both():
    got = vector(l1=[1.0, 2.0], l2=[5.0, 5.0]) + vector("b", l1=[10.0, 20.0], l0=[7.0, 7.0])
    assert as_lists(got) == {0: [7, 7], 1: [11, 22], 2: [5, 5]}
    assert got.axis == "a + b"


def test_multiple_and_difference():
    a, b = vector(l1=[1.0, 2.0]), vector("b", l1=[4.0, 8.0])
    assert as_lists(3 * a) == as_lists(a * 3.0) == {1: [3, 6]}
    assert as_lists(b + -1 * a) == {1: [3, 6]}


def test_project_out_leaves_the_orthogonal_component():
    a = vector(l1=[3.0, 4.0, 5.0], l2=[1.0, 1.0, 1.0])
    got = a.project_out(vector("b", l1=[0.0, 10.0, 0.0]))
    assert as_lists(got) == {1: [3, 0, 5], 2: [1, 1, 1]}
    assert got.axis == "a without b"


def test_nothing_is_left_of_the_span_of_correlated_directions():
    # Removing one after the other would bring back a part of the first: they are 45 degrees apart.
    a = vector(l1=[3.0, 4.0, 5.0], l2=[1.0, 2.0, 3.0])
    b, c = vector("b", l1=[2.0, 0.0, 0.0]), vector("c", l1=[1.0, 1.0, 0.0], l2=[0.0, 0.0, 1.0])
    got = a.project_out(b, c)
    assert got.directions[1].tolist() == pytest.approx([0, 0, 5], abs=1e-6)
    assert as_lists(got)[2] == [1, 2, 0]
    assert got.axis == "a without b, c"
    # A direction twice, or one that others span, removes nothing more.
    assert torch.allclose(a.project_out(b, c, 3 * b).directions[1], got.directions[1])


def test_invalid_operands_are_rejected():
    a = vector(l1=[3.0, 4.0])
    for make in (lambda b: a + b, a.project_out):
        with pytest.raises(ShlError, match="made on m and other"):
            make(vector("b", model="other", l1=[1.0, 1.0]))
    with pytest.raises(ShlError, match="share none"):
        a.project_out(vector("b", l2=[1.0, 1.0]))
    with pytest.raises(ShlError, match="of b at layer 1 is 0"):
        a.project_out(vector("b", l1=[0.0, 0.0]))
    with pytest.raises(ShlError, match="got no vector"):
        a.project_out()


def test_sum_of_vectors_equals_nested_steering():
    model = tiny_gemma()
    g = torch.Generator().manual_seed(0)
    a, b = (
        SteeringVector({1: torch.randn(32, generator=g)}, "tiny-gemma", name, 8) for name in "ab"
    )
    tokens = tokens_of(2, 9)
    with a.steering(model, 0.5), b.steering(model, -2.0):
        expected = model(tokens)
    with (0.5 * a + -2.0 * b).steering(model, 1.0):
        assert (model(tokens) - expected).abs().max() <= 1e-5


def test_first_component_is_the_first_principal_axis():
    # Differences (8, 1), (8, -1), (-2, 0) before the last sign: the first axis carries
    # 64 + 64 + 4 = 132, the second 2; its mean is (8 + 8 - 2) / 3.
    negative = torch.zeros(3, 2)
    positive = torch.tensor([[8.0, 1.0], [8.0, -1.0], [-2.0, 0.0]])
    got = first_component(positive, negative)
    assert got.tolist() == pytest.approx([14 / 3, 0.0], abs=1e-6)
    assert first_component(negative, positive).tolist() == pytest.approx([-14 / 3, 0.0], abs=1e-6)


def test_vector_depends_on_the_rule():
    model, axis = tiny_gemma(), load_axis("love")
    vectors = {
        rule: extract_vector(model, axis, [1], contexts=6, rule=rule).directions[1]
        for rule in (mean_difference, first_component)
    }
    mean, component = vectors.values()
    assert not torch.equal(mean, component)
    assert torch.cosine_similarity(mean, component, dim=0) > 0
