"""The embedded gemma-3-270m itself, against transformers on the same cached folder, and the
notebook that shows it."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import random_adapter
from matplotlib.figure import Figure
from peft import PeftModel
from test_notebooks import NAMES, cells, run
from transformers import AutoModelForCausalLM

import shl
from experiments.run import random_vectors
from shl.config import FOUNDATIONS, LoopConfig
from shl.hooks.adapter import Adapter
from shl.hooks.bake import baked
from shl.hooks.vector import SteeringVector
from shl.models.as_hf import as_hf
from shl.models.export import export_peft
from shl.models.generate import generate
from shl.models.load import load_model
from shl.models.tokens import encode
from shl.models.weights import model_folder
from shl.utils.errors import ShlError

PROMPTS = ["What helps you fall asleep after an exciting day at the sea?", "Hi, how are you?"]
SETTINGS = {"temperature": 0.0, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def model():
    return load_model(device="cpu")


@pytest.fixture
def hf():
    folder = model_folder("gemma-3-270m")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_forward_is_as_exact_as_transformers_past_the_window(model, hf):
    """Root mean square error of 600 random tokens' logits against float64."""
    tokens = torch.randint(10, 262_000, (1, 600), generator=torch.Generator().manual_seed(0))
    some = torch.randperm(262_144, generator=torch.Generator().manual_seed(1))[:4000]
    readout = model.W_U[:, some].double()
    last = model.cfg.n_layers

    def error(hidden, exact):
        return float((hidden[0].double() @ readout - exact).square().mean().sqrt())

    with torch.no_grad():
        theirs = hf.model(tokens).last_hidden_state
        fast = model.ln_final(model(tokens, stop_at_layer=last))
        exact = hf.double().model(tokens).last_hidden_state[0] @ readout
        plain = load_model(device="cpu", fast=False)
        stock = plain.ln_final(plain(tokens, stop_at_layer=last))
    bound = error(theirs, exact)
    assert 1e-6 < bound < 1e-3
    assert error(fast, exact) <= 1.5 * bound
    # Stock TransformerLens rounds the rotation's angles in another way.
    assert error(stock, exact) <= 8 * bound


def test_model_agrees_with_transformers_and_batches_with_single_rows(model, hf):
    rows = [encode(model, prompt) for prompt in PROMPTS]
    assert len(rows[0]) > len(rows[1]) + 4
    ids = torch.tensor(rows[:1])
    with torch.no_grad():
        difference = (model(ids) - hf(ids).logits).abs().max()
    assert float(difference) <= 1e-3

    plain = generate(model, PROMPTS, **SETTINGS)
    for row, completion in zip(rows, plain, strict=True):
        ids = torch.tensor([row])
        mask = torch.ones_like(ids)
        answer = hf.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=8)
        expected = answer[0, len(row) :].tolist()
        # `generate` stops at a turn end ("\nQ:"), transformers continues.
        assert list(completion.tokens) == expected[: len(completion.tokens)]
        assert len(completion.tokens) >= 4 or completion.ended

    v = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    vector = SteeringVector({9: 100 * v}, "gemma-3-270m", "demo", 1)
    with vector.steering(model):
        batched = generate(model, PROMPTS, **SETTINGS)
        single = [generate(model, [prompt], **SETTINGS)[0] for prompt in PROMPTS]
    assert [c.tokens for c in batched] == [c.tokens for c in single]
    assert [c.tokens for c in batched] != [c.tokens for c in plain]


def test_a_bridge_equals_transformers_and_takes_files_of_the_other_engine(model, hf, tmp_path):
    """Where there is no HookedTransformer, both models are bridges."""
    bridge = load_model(engine="bridge", device="cpu")
    tokens = torch.randint(10, 262_000, (1, 600), generator=torch.Generator().manual_seed(0))
    v = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    vector = SteeringVector({9: 30 * v}, "gemma-3-270m", "demo", 1)
    vector.save(tmp_path / "v.safetensors")
    random_adapter(model, layers=(3, 9), size=0.02).save(tmp_path / "a.safetensors")
    with torch.no_grad():
        plain = bridge(tokens)
        assert float((plain - hf(tokens).logits).abs().max()) <= 1e-5
        for row, text in zip(
            [encode(bridge, prompt) for prompt in PROMPTS],
            generate(bridge, PROMPTS, **SETTINGS),
            strict=True,
        ):
            answer = hf.generate(torch.tensor([row]), do_sample=False, max_new_tokens=8)
            assert list(text.tokens) == answer[0, len(row) :].tolist()[: len(text.tokens)]
        logits = []
        for one in (model, bridge):
            vector = SteeringVector.load(tmp_path / "v.safetensors", one, any_weights=True)
            adapter = Adapter.load(tmp_path / "a.safetensors", one)
            with baked(one, [adapter]), vector.steering(one):
                logits.append(one(tokens[:, :60]))
    assert float((logits[0] - plain[:, :60]).abs().max()) > 1.0
    assert float((logits[0] - logits[1]).abs().max()) <= 1e-3


def test_as_hf_equals_transformers(model, hf):
    rows = [encode(model, prompt) for prompt in PROMPTS]
    short, width = len(rows[1]), len(rows[0])
    ids = torch.tensor([rows[0], [0] * (width - short) + rows[1]])
    mask = torch.tensor([[1] * width, [0] * (width - short) + [1] * short])
    view, new = as_hf(model), torch.tensor([rows[0][1:5]])
    greedy = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    with torch.no_grad():
        ours, theirs = (m(ids, attention_mask=mask).logits for m in (view, hf))
        assert float((ours - theirs)[mask.bool()].abs().max()) <= 1e-3
        ours, theirs = (m.generate(ids, attention_mask=mask, **greedy) for m in (view, hf))
        assert torch.equal(ours, theirs)
        left = view(ids, attention_mask=mask).past_key_values
        alone = view(ids[1:, width - short :]).past_key_values
        batched = view(new.repeat(2, 1), past_key_values=left).logits[1:]
        assert float((batched - view(new, past_key_values=alone).logits).abs().max()) <= 1e-3


def test_peft_export_gives_the_logits_of_all_rounds(model, hf, tmp_path):
    layers = (3, 9, 15)
    adapters = [
        random_adapter(model, layers=layers[: 2 + i], seed=i, rank=i + 2, size=0.02)
        for i in range(2)
    ]
    folder = export_peft(adapters, tmp_path / "peft")
    ids = torch.tensor([encode(model, PROMPTS[0])])
    with torch.no_grad():
        plain = model(ids)
        with baked(model, adapters):
            ours = model(ids)
        with warnings.catch_warnings():
            # PEFT uses a deprecated name of transformers.
            warnings.simplefilter("ignore", FutureWarning)
            theirs = PeftModel.from_pretrained(hf, folder).eval()(ids).logits
    assert float((ours - plain).abs().max()) > 1.0
    assert float((ours - theirs).abs().max()) <= 1e-4
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "google/gemma-3-270m"


def test_adapter_files_are_bound_to_the_weights(model, tmp_path):
    path = tmp_path / "a.safetensors"
    random_adapter(model, ("q",), (9,)).save(path)
    assert Adapter.load(path, model).dtype == "float32"
    weight = model.blocks[9].mlp.W_in
    own = weight.data
    weight.data = own + 1e-3
    try:
        with pytest.raises(ShlError, match="on weights of gemma-3-270m with the hash"):
            Adapter.load(path, model)
    finally:
        weight.data = own


def test_shipped_readings_are_those_of_random_vectors(model, tmp_path, monkeypatch):
    """All are found, and the first of 20 vectors is matched and read anew."""
    cloze, loop = shl.load_axis("love").cloze, LoopConfig()
    with monkeypatch.context() as patch:
        patch.setenv("SHL_CACHE", str(tmp_path / "cache"))
        patch.setattr("shl.measure.nulls.matched_scales", None)
        shipped = {e["instrument"]: e["values"] for e in random_vectors(model, cloze, loop)}
    assert not (tmp_path / "cache").exists()
    one = replace(loop, eval=replace(loop.eval, nulls=1))
    fresh = random_vectors(model, cloze, one, tmp_path / "nulls")
    assert {event["instrument"] for event in fresh} == {*FOUNDATIONS, "cloze"}
    for event in fresh:
        whole = np.array(shipped[event["instrument"]])
        assert whole.shape == (1, 20, 2)
        # Where a divergence lies close to the tolerance of 5 %, the scale may be another one.
        np.testing.assert_allclose(event["values"], whole[:, :1], rtol=0.06, atol=0.03)


def test_first_notebook(model, monkeypatch):
    assert [name[:2] for name in NAMES] == ["01", "02", "03", "04"]
    # The stored outputs were computed on a CPU.
    monkeypatch.setattr(shl, "load_model", {"gemma-3-270m": model}.__getitem__)
    # No stored output depends on these answers.
    changes = {"axis.prompts[:4], max_new_tokens=24": "axis.prompts[:2], max_new_tokens=12"}
    space, outputs = run(NAMES[0], monkeypatch, changes)
    stored = "".join("".join(o.get("text", "")) for c in cells(NAMES[0]) for o in c["outputs"])
    # The same seeds repeat the texts of the weaker doses; on another CPU one of them may differ,
    # where a draw lies within the last bits of a boundary.
    lines = [x for x in outputs if isinstance(x, str) and x[:4] in ("-0.5", "+0.0", "+0.5")]
    assert len(lines) == 3
    assert sum(line in stored for line in lines) >= 2
    divergence = space["response"].divergence("rmse").median(1).values
    assert float(divergence[2]) < 1e-4  # dose 0
    assert divergence.argmin() == 2
    assert divergence[3] < divergence[4] < divergence[5]
    assert len([x for x in outputs if isinstance(x, Figure)]) == 2
