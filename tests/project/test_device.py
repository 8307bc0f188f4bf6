"""Whole runs on a GPU, or where there is none on a device that is simulated on the CPU.

A simulated tensor says that it is on the device and holds its data on the CPU. An operation that
mixes it with a CPU tensor raises, as it does on a GPU. What depends on `is_cuda` is not reached
there: products of 16 bits, chunks for a GPU, the Triton kernel by default.
"""

import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from helpers import lenient, small_loop
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

import shl
from shl.config import METHOD, DoseConfig, EvalConfig, HealConfig, OnlineConfig, VectorConfig
from shl.models.load import build_bridge
from shl.models.scores import base_perplexities
from shl.models.tiny import tiny_gemma, tiny_hf

pytestmark = pytest.mark.hooked
AXIS = shl.load_axis("love")
SIMULATED = torch.device("lazy:0")
ATEN = torch.ops.aten
COPIES = {ATEN._to_copy.default, ATEN.copy_.default}
"""Operations between devices."""
INDEXING = {
    ATEN.index.Tensor,
    ATEN.index_put.default,
    ATEN.index_put_.default,
    ATEN._index_put_impl_.default,
}
"""Operations that take indices on the CPU for a tensor on the device."""


class Simulated(torch.Tensor):
    """A tensor on the simulated device; `on_cpu` holds its data."""

    @staticmethod
    def __new__(cls, on_cpu):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            on_cpu.size(),
            strides=on_cpu.stride(),
            storage_offset=on_cpu.storage_offset(),
            dtype=on_cpu.dtype,
            device=SIMULATED,
        )

    def __init__(self, on_cpu):
        self.on_cpu = on_cpu

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, other):
        torch.Tensor.data.__set__(self, other)
        self.on_cpu = other.on_cpu

    def tolist(self):
        return self.on_cpu.tolist()

    def numpy(self, **_):
        raise TypeError(f"a tensor on {SIMULATED} has no numpy array")

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return run_on_cpu(op, args, kwargs or {})


class Simulation(TorchDispatchMode):
    """While it is active, tensors can be made on the simulated device and moved there."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return run_on_cpu(op, args, kwargs or {})


def tensors_in(x):
    """The tensors among arguments, in lists too."""
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, list | tuple):
        for y in x:
            yield from tensors_in(y)


def mapped(change, x):
    """`x` with `change` applied to each tensor."""
    if isinstance(x, torch.Tensor):
        return change(x)
    return type(x)(mapped(change, y) for y in x) if isinstance(x, list | tuple) else x


def data_of(x):
    return x.on_cpu if isinstance(x, Simulated) else x


def run_on_cpu(op, args, kwargs):
    """Run an operation on the data, and wrap what it returns if that is on the device."""
    everything = list(tensors_in((args, tuple(kwargs.values()))))
    ours = any(isinstance(x, Simulated) for x in everything)
    asked = kwargs.get("device")
    if asked is None and not ours:
        return op(*args, **kwargs)
    indexed = op in INDEXING and isinstance(args[0], Simulated)
    compared = tensors_in((args[0], *args[2:])) if indexed else everything
    # Scalars mix with tensors of any device.
    places = {isinstance(x, Simulated) for x in compared if x.ndim or isinstance(x, Simulated)}
    if len(places) == 2 and op not in COPIES:
        raise RuntimeError(f"{op} of tensors on {SIMULATED} and on the CPU")
    named = {name: mapped(data_of, x) for name, x in kwargs.items()}
    if asked is not None:
        named["device"] = torch.device("cpu")
    out = op(*mapped(data_of, args), **named)
    if torch.Tag.inplace_view in op.tags:
        return return_and_correct_aliasing(op, args, kwargs, mapped(Simulated, out))
    if op._schema.is_mutable:
        return kwargs.get("out", args[0])
    if asked is not None and torch.device(asked) != SIMULATED:
        return out
    return mapped(Simulated, out)


@contextmanager
def simulated():
    """The simulated device, while it can be used."""
    lift = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor makes a CPU tensor and moves it
    try:
        with Simulation():
            yield SIMULATED
    finally:
        torch._C._set_only_lift_cpu_tensors(lift)


@pytest.fixture
def device():
    if torch.cuda.is_available():
        yield torch.device("cuda:0")
    else:
        with simulated() as found:
            yield found


def placed(device, *, dtype=torch.float32, engine="hooked"):
    """The tiny Gemma on the device."""
    if engine == "bridge":
        tokenizer = tiny_gemma(engine=engine).tokenizer
        return build_bridge(tiny_hf().to(device), tokenizer, name="tiny-gemma")
    return tiny_gemma().to(dtype).to(device, print_details=False)


def test_a_simulated_device_refuses_what_a_gpu_refuses():
    with simulated() as device:
        here, there = torch.tensor([1.0, 2.0], device=device), torch.ones(2)
        assert (here + 1).device == device
        assert (here + there.to(device)).cpu().tolist() == [2.0, 3.0]
        assert here[torch.tensor([1])].tolist() == [2.0]
        for wrong in (
            lambda: here + there,
            lambda: there[here.long() - 1],
            lambda: torch.cat([here, there]),
            lambda: here.index_put_((torch.tensor([0]),), there[:1]),
            lambda: here.numpy(),
        ):
            with pytest.raises((RuntimeError, TypeError)):
                wrong()


METHOD_ = replace(METHOD, rank=2, epochs=1, batch_size=4)
RUNS = {
    "method": {"heal": METHOD_, "vector": VectorConfig(contexts=3, remove=("valence",))},
    "clip, backtrack": {
        "heal": replace(METHOD_, clip=0.1, aggregate="p95", tau=0.01),
        "dose": DoseConfig(walk=False, probe_size=2, min_train=4, batch_size=4, backtrack=True),
    },
    "odd, forward, prev": {
        "heal": replace(METHOD_, odd=True, divergence="kl_fwd", reference="prev", sv_penalty=0.1),
        "vector": VectorConfig(contexts=3, direction="random"),
    },
    "online": {"mode": "online", "online": OnlineConfig(every=2)},
    "reward": {"mode": "online", "online": OnlineConfig(every=1, objective="reward")},
}


def round_of(model, name):
    """One round of a run that is smaller still."""
    few = EvalConfig(samples=2, bootstrap=20, conflicts=4, nulls=0)
    with torch.enable_grad():
        [found] = shl.love(model, AXIS, small_loop(rounds=1, eval=few, **RUNS[name]))
    return found


@pytest.mark.parametrize("name", RUNS)
def test_a_round_on_the_device_equals_that_on_the_cpu(name, device, monkeypatch):
    lenient(monkeypatch)
    here, there = round_of(placed(device), name), round_of(tiny_gemma(), name)
    assert here.kappa == there.kappa
    assert [c.tokens for c in here.kept] == [c.tokens for c in there.kept]
    for one, other in ((here.steered, there.steered), (here.healed, there.healed)):
        assert one.nats == pytest.approx(other.nats, abs=1e-3)
    for a, b in zip(here.adapter.parameters(), there.adapter.parameters(), strict=True):
        assert a.device == device
        assert float((a.cpu() - b).norm() / b.norm()) < 1e-2


@pytest.mark.parametrize("name", ["method", "reward"])
def test_a_round_in_bf16_moves_the_student(name, device, monkeypatch):
    lenient(monkeypatch)
    found = round_of(placed(device, dtype=torch.bfloat16), name)
    assert all(norm > 0 for norm in found.adapter.norms().values())
    assert all(map(math.isfinite, found.healed.nats.values()))


@pytest.mark.parametrize("engine", ["hooked", "bridge"])
def test_instruments_and_analysis_on_the_device_equal_those_on_the_cpu(
    engine, device, monkeypatch, tmp_path
):
    lenient(monkeypatch)

    def found(model):
        prompts = ["Hello?", "How are you today?"]
        vector = shl.extract_vector(model, AXIS, contexts=4)
        with vector.steering(model, torch.tensor([0.5, 1.0])):
            texts = shl.generate(model, prompts, max_new_tokens=8, min_new_tokens=8)
        with torch.enable_grad():
            adapter = shl.heal(model, texts, HealConfig(rank=2, epochs=1, tau=0.01))
        adapter.save(tmp_path / "a.safetensors")
        vector.save(tmp_path / "v.safetensors")
        adapter = shl.Adapter.load(tmp_path / "a.safetensors", model)
        vector = shl.SteeringVector.load(tmp_path / "v.safetensors", model)
        out = [float(x) for c in texts for x in c.tokens]
        out += list(vector.norms().values()) + list(adapter.norms().values())
        for materialise in (False, True):
            with shl.baked(model, [adapter], materialise=materialise):
                scores = shl.evaluate(model)
                out += list(scores.nats.values())
        out += [x for pair in base_perplexities(model, texts) for x in pair]
        for kept in shl.activations(model, prompts, ["blocks.1.hook_resid_post"]).values():
            out += kept.flatten().tolist()
        ids = torch.tensor([[2, 5, 7]], device=model.W_U.device)
        out += shl.as_hf(model).generate(ids, max_new_tokens=4, do_sample=False)[0].tolist()
        response = shl.dose_response(model, vector, texts, doses=(0.0, 1.0))
        out += response.divergence().flatten().tolist()
        report = shl.check(model)
        # The first line compares with transformers' copy of a stored model.
        assert all(line.ok for line in report.lines[1:]), str(report)
        return out

    on_cpu = found(tiny_gemma(engine=engine))
    assert found(placed(device, engine=engine)) == pytest.approx(on_cpu, rel=1e-3, abs=1e-4)
