"""Activations equal those of `run_with_cache`, at the given positions."""

import inspect

import pytest
import torch
from helpers import one_sentence, random_adapter
from typing_extensions import get_protocol_members

from shl.hooks.bake import baked
from shl.hooks.recorder import Recorder
from shl.models.activations import activations, difference
from shl.models.generate import generate
from shl.models.tokens import encode
from shl.utils.errors import ShlError
from shl.utils.model import Model

PROMPTS = ["Hi?", "What about you then?", "z"]
NAMES = ["blocks.0.hook_resid_post", "blocks.1.attn.hook_z", "blocks.2.mlp.hook_post"]


@pytest.mark.parametrize("position", [-1, 0, 3, -4])
def test_activations_equal_run_with_cache_row_by_row(model, position):
    got = activations(model, PROMPTS, NAMES, tokens=position, batch_size=2)
    for i, prompt in enumerate(PROMPTS):
        _, cache = model.run_with_cache(torch.tensor([encode(model, prompt)]))
        for name in NAMES:
            assert (got[name][i] - cache[name][0, position]).abs().max() <= 1e-4


def test_recorder_stores_each_step_of_cached_decoding(gemma):
    with Recorder(gemma, NAMES[:1]) as recorder:
        (text,) = generate(gemma, ["Hello?"], max_new_tokens=5, min_new_tokens=5)
    row = torch.tensor([[*text.prompt_tokens, *text.tokens]])
    _, cache = gemma.run_with_cache(row)
    seen = torch.cat(recorder.seen[NAMES[0]], 1)
    # The last token is sampled but not run.
    assert (seen - cache[NAMES[0]][:, :-1]).abs().max() <= 1e-4
    generate(gemma, ["Hello?"], max_new_tokens=2)
    assert sum(x.shape[1] for x in recorder.seen[NAMES[0]]) == seen.shape[1]


def test_several_tokens_are_in_the_given_order(model):
    got = activations(model, PROMPTS, NAMES, tokens=[3, -1, 0], batch_size=2)
    for i, token in enumerate([3, -1, 0]):
        one = activations(model, PROMPTS, NAMES, tokens=token, batch_size=2)
        assert all(torch.equal(got[name][:, i], one[name]) for name in NAMES)


@pytest.mark.parametrize("batch_size", [2, 8])
def test_rows_of_cached_decoding_have_absolute_positions(model, batch_size):
    # They share a prefix that `generate` runs once if no hook requires every row.
    prompts = ["The same long beginning, and then?", "The same long beginning?", "The same long?"]
    with Recorder(model, NAMES, positions=slice(None)) as recorder:
        texts = generate(model, prompts, max_new_tokens=6, batch_size=batch_size, seed=3)
    for i, text in enumerate(texts):
        row = torch.tensor([[*text.prompt_tokens, *text.tokens]])
        _, cache = model.run_with_cache(row)
        for name in NAMES:
            where = torch.cat(recorder.where[name])
            seen = torch.cat(recorder.seen[name])[where[:, 0] == i]
            at = where[where[:, 0] == i, 1]
            assert at.tolist() == list(range(len(at)))
            # The last token is sampled but not run; a removed end of turn may have been run.
            ran = min(len(at), row.shape[1])
            assert ran >= row.shape[1] - 1
            assert (seen[:ran] - cache[name][0, :ran]).abs().max() <= 1e-4


def test_recorded_tensors_of_inference_mode_can_be_used_in_autograd(gemma):
    with torch.inference_mode(), Recorder(gemma, NAMES[:1]) as recorder:
        gemma(torch.tensor([[2, 5, 6]]))
    (x,) = recorder.seen[NAMES[0]]
    w = torch.ones(32, requires_grad=True)
    (x * w).sum().backward()
    assert torch.equal(w.grad, x.sum((0, 1)))


def test_difference_is_the_healed_model_minus_base(gemma):
    name = "blocks.3.hook_resid_post"
    with baked(gemma, [random_adapter(gemma, ["down"], (1,))]):
        got = difference(gemma, PROMPTS, [0, 1, 3])
        healed = activations(gemma, PROMPTS, [name])[name]
    base = activations(gemma, PROMPTS, [name])[name]
    assert torch.equal(got[0], torch.zeros(3, 32))
    assert (got[3] - (healed - base)).abs().max() <= 1e-5
    assert got[1].abs().max() > 0.01


@pytest.mark.parametrize(
    ("names", "position", "message"),
    [
        (["blocks.0.hook_nothing"], -1, "is not a HookPoint"),
        (["blocks.0.hook_resid_post"], 8, "token 8 is out of range for a prompt of 8 tokens"),
        (["blocks.0.hook_resid_post"], -99, "token -99"),
        (["blocks.0.attn.hook_pattern"], -1, "is not the position"),
        (["unembed.hook_out"], -1, "not reached"),
    ],
)
def test_invalid_names_and_positions_are_rejected(gemma, names, position, message):
    with pytest.raises(ShlError) as error:
        activations(gemma, ["a", "Hello there, you"], names, tokens=position)
    assert message in one_sentence(error)


def test_every_model_is_a_model_where_isinstance_sees_no_submodules(model):
    """Python 3.12 looks protocol members up with `inspect.getattr_static`."""
    members = get_protocol_members(Model)
    assert {"cfg", "W_U", "run_with_cache", "parameters"} <= members
    for name in members:
        inspect.getattr_static(model, name)
