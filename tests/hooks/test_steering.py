"""Steering: no change before the layer and exactly h + dose v at it."""

import pytest
import torch
from helpers import empty_cache, one_sentence, tokens_of

from shl.hooks.sites import residual_after
from shl.hooks.vector import SteeringVector
from shl.utils.errors import ShlError

TOKENS = tokens_of(3, 20)


@pytest.fixture
def vector(model):
    g = torch.Generator().manual_seed(0)
    directions = {1: torch.randn(32, generator=g)}
    return SteeringVector(directions, model.cfg.model_name, "demo", 1)


def post(layer):
    return f"blocks.{layer}.hook_resid_post"


def test_steering_changes_nothing_before_its_layer_and_adds_dose_v_at_it(model, vector):
    _, before = model.run_with_cache(TOKENS)
    with vector.steering(model, dose=0.75):
        logits, cache = model.run_with_cache(TOKENS)
    at = list(cache).index(residual_after(model, 1).name)
    for name in list(cache)[:at]:
        assert torch.equal(cache[name], before[name]), name
    assert torch.equal(cache[post(1)], before[post(1)] + 0.75 * vector.directions[1])
    assert (cache[post(2)] - before[post(2)]).abs().max() > 0.1
    assert (logits - model(TOKENS)).abs().max() > 0.1


def test_steering_equals_a_transformerlens_hook(model, vector):
    v = vector.directions[1]
    own = [(post(1), lambda h, hook: h + 2.0 * v)]
    with vector.steering(model, dose=2.0):
        assert torch.equal(model(TOKENS), model.run_with_hooks(TOKENS)) is True
        steered = model(TOKENS)
    assert torch.equal(steered, model.run_with_hooks(TOKENS, fwd_hooks=own))


def test_several_layers_are_steered_each_with_its_own_vector(model):
    directions = {0: torch.full((32,), 0.3), 2: torch.full((32,), -0.2)}
    own = [(post(i), lambda h, hook, v=v: h + v) for i, v in directions.items()]
    expected = model.run_with_hooks(TOKENS, fwd_hooks=own)
    with SteeringVector(directions, "tiny", "demo", 1).steering(model):
        assert torch.equal(model(TOKENS), expected)


@pytest.mark.parametrize("dose", [1.5, torch.tensor([1.5, 0.0, -1.0])])
def test_steering_is_the_same_in_cached_decoding(model, vector, dose):
    seen = []
    with vector.steering(model, dose=dose):
        whole = model(TOKENS)
    with (
        # This hook is added before the handle's, so it gets the unsteered residual.
        model.hooks(fwd_hooks=[(post(1), lambda h, hook: seen.append(h))]),
        vector.steering(model, dose=dose),
    ):
        cache = empty_cache(model, 3)
        steps = [TOKENS[:, :12], *TOKENS[:, 12:].split(1, dim=1)]
        start = 0
        for step in steps:
            logits, kept = model.run_with_cache(
                step, attention_mask=torch.ones_like(step), past_kv_cache=cache
            )
            start += step.shape[1]
            assert (logits[:, -1] - whole[:, start - 1]).abs().max() <= 1e-4
            added = dose if isinstance(dose, float) else dose[:, None, None]
            assert torch.equal(kept[post(1)], seen.pop() + added * vector.directions[1])


def test_dose_0_is_exactly_the_identity(model, vector):
    base = model(TOKENS)
    for dose in (0, 0.0, -0.0):
        with vector.steering(model, dose=dose):
            assert torch.equal(model(TOKENS), base)
    with vector.steering(model, dose=torch.zeros(3)):
        assert torch.equal(model(TOKENS), base)


def test_each_row_gets_its_own_dose(model, vector):
    doses = [0.5, 0.0, -1.0]
    with vector.steering(model, dose=torch.tensor(doses)):
        got = model(TOKENS)
    for row, dose in enumerate(doses):
        with vector.steering(model, dose=dose):
            assert torch.equal(got[row], model(TOKENS)[row])


def test_wrong_number_of_doses_is_rejected(model, vector):
    with vector.steering(model, dose=torch.ones(2)), pytest.raises(ShlError) as error:
        model(TOKENS)
    assert "2 per-row doses were given for a batch of 3 rows" in one_sentence(error)


def test_steering_nests_inside_the_callers_hooks(model, vector):
    v = vector.directions[1]
    both = [(post(0), lambda h, hook: 2 * h), (post(1), lambda h, hook: h + v)]
    expected = model.run_with_hooks(TOKENS, fwd_hooks=both)
    with model.hooks(fwd_hooks=both[:1]), vector.steering(model):
        assert torch.equal(model(TOKENS), expected)
        with vector.steering(model, dose=-1.0):  # two vectors add up
            twice = model(TOKENS)
        assert torch.equal(model(TOKENS), expected)
    undone = model.run_with_hooks(TOKENS, fwd_hooks=both[:1])
    assert (twice - undone).abs().max() <= 1e-4


def test_vector_of_another_width_or_depth_is_rejected(gemma):
    for directions, named in (
        ({1: torch.ones(31)}, "shape .31,., tiny-gemma has d_model 32"),
        ({4: torch.ones(32)}, "layer 4 is out of range"),
    ):
        with pytest.raises(ShlError, match=named) as error:
            SteeringVector(directions, "tiny", "demo", 1).steering(gemma)
        one_sentence(error)
