"""Tiny models shared by the tests, and a guard that no test leaves a hook on them."""

import functools
import os
import typing
from pathlib import Path

# Triton reads this when it is imported; without a GPU its kernels run in Python.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

import jaxtyping

# Python 3.11 collects a protocol's attributes anew at each check that something is a `Model`.
typing._get_protocol_attrs = functools.cache(typing._get_protocol_attrs)
jaxtyped = jaxtyping.jaxtyped


def checked(*, typechecker):
    """jaxtyping's decorator for classes and for functions with arrays in their signature, the type
    checker alone for other functions: jaxtyping binds the arguments of each call and checks them
    twice, which takes a quarter of the tests' time."""
    shapes = jaxtyped(typechecker=typechecker)

    def decorate(made):
        arrays = isinstance(made, type) or "jaxtyping." in str(made.__annotations__)
        return (shapes if arrays else typechecker)(made)

    return decorate


jaxtyping.jaxtyped = checked

import helpers
import pytest
import torch

from shl.models.load import choose_engine
from shl.models.tiny import tiny_gemma

torch.set_num_threads(1)
HOOKED = choose_engine("auto") == "hooked"
SLOW = ("project", "experiments")
"""Folders whose tests run the program, real models or builds."""


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
    return model


@pytest.fixture(params=["gemma", "llama", "stock_gemma", "bridge_gemma"])
def model(request):
    """One tiny model after the other."""
    return request.getfixturevalue(request.param)


def pytest_collection_modifyitems(items):
    """Only hooks and models are tested on the stock classes and the bridge as well. Without
    HookedTransformer every model is a bridge."""
    kept = []
    for item in items:
        params = getattr(item, "callspec", None)
        fixture = params.params.get("model") if params else None
        own = item.get_closest_marker("hooked") is not None
        if fixture in ("stock_gemma", "bridge_gemma"):
            if item.path.parent.name not in ("hooks", "models"):
                continue
            if fixture == "bridge_gemma" and (own or not HOOKED):
                continue
        kept.append(item)
        if not HOOKED and (own or fixture == "stock_gemma"):
            reason = "needs HookedTransformer, which TransformerLens 4 does not have"
            item.add_marker(pytest.mark.skip(reason=reason))
    # What takes long begins first, so that one worker does not end long before the other.
    items[:] = sorted(kept, key=lambda item: item.path.parent.name not in SLOW)


def pytest_addoption(parser):
    parser.addoption("--skips", type=int, help="fail unless this many tests are skipped")


def pytest_sessionfinish(session):
    """Fail if the number of skipped tests is not the expected one."""
    expected = session.config.getoption("--skips")
    if expected is None or hasattr(session.config, "workerinput"):
        return  # a worker of pytest-xdist sees only its own tests
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = len(reporter.stats.get("skipped", []))
    if skipped != expected:
        reporter.write_line(f"{skipped} tests were skipped, {expected} must be", red=True)
        session.exitstatus = 1


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
