"""Tiny models shared by the tests, and a guard that no test leaves a hook on them."""

import os
from pathlib import Path

# Triton reads this when it is imported; without a GPU its kernels run in Python.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

import helpers
import pytest
import torch

from shl.models.tiny import tiny_gemma

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def gemma():
    """A random Gemma-3: 4 layers (local, local, global, local), window 8, one kv head."""
    return tiny_gemma()


@pytest.fixture(scope="session")
def llama():
    """A random Llama: 3 layers, 4 heads on 2 kv heads, untied unembedding."""
    return helpers.tiny_llama()


@pytest.fixture(scope="session")
def stock_gemma():
    """The same Gemma with TransformerLens's own classes."""
    return tiny_gemma(fast=False)


@pytest.fixture(scope="session")
def bridge_gemma():
    """The same Gemma on a TransformerBridge, with transformers' SDPA."""
    model = tiny_gemma(engine="bridge")
    model.original_model.set_attn_implementation("sdpa")
    model(helpers.tokens_of(1, 2))  # the first forward adds TransformerLens's own pre-hooks
    return model


@pytest.fixture(params=["gemma", "llama", "stock_gemma", "bridge_gemma"])
def model(request):
    """One tiny model after the other."""
    return request.getfixturevalue(request.param)


def pytest_collection_modifyitems(items):
    """Only hooks and models are tested on the stock classes and the bridge as well."""
    items[:] = [
        item
        for item in items
        if not {"stock_gemma", "bridge_gemma"}
        & {str(x) for x in getattr(item, "callspec", item).__dict__.get("params", {}).values()}
        or item.path.parent.name in ("hooks", "models")
    ]


@pytest.fixture(autouse=True)
def no_hook_is_left(request):
    """Every test takes its hooks off again."""
    names = [
        name
        for name in ("gemma", "llama", "stock_gemma", "bridge_gemma", "model")
        if name in request.fixturenames
    ]
    models = [request.getfixturevalue(name) for name in names]
    before = [helpers.hook_count(model) for model in models]
    yield
    assert [helpers.hook_count(model) for model in models] == before
