"""Fingerprints distinguish base weights, whatever hooks are on."""

import pytest
import torch
from helpers import random_adapter

from shl.hooks.bake import baked
from shl.hooks.fingerprint import SAMPLED, _sampled, dtype_of, name_of, weights_hash
from shl.models.load import build_model, load_model
from shl.models.tiny import tiny_gemma, tiny_hf, tiny_tokenizer


def test_hash_of_equal_and_different_weights(gemma, llama):
    assert weights_hash(gemma) == weights_hash(tiny_gemma())
    seen = {weights_hash(m) for m in (gemma, llama, tiny_gemma(seed=1), tiny_gemma(n_layers=3))}
    assert len(seen) == 4


@pytest.mark.hooked
def test_change_in_place_and_dtype_change_the_hash():
    model = tiny_gemma()
    before = weights_hash(model)
    with torch.no_grad():
        model.blocks[2].mlp.W_in[5, 7] += 1e-3
    assert weights_hash(model) != before
    with torch.no_grad():
        model.blocks[2].mlp.W_in[5, 7] -= 1e-3
    model.blocks[2].mlp.W_in.data = tiny_gemma().blocks[2].mlp.W_in.data
    assert weights_hash(model) == before
    hf = tiny_hf()
    half = build_model(hf.config, hf.state_dict(), None, name="tiny-gemma", dtype=torch.bfloat16)
    assert (dtype_of(model), dtype_of(half)) == ("float32", "bfloat16")
    assert weights_hash(half) != before


def test_adapters_do_not_change_the_hash(model):
    before = weights_hash(model)
    for inside in (False, True):
        with baked(model, [random_adapter(model)], materialise=inside):
            assert weights_hash(model) == before
            logits = model(torch.tensor([[5, 6]]))
        assert not torch.equal(logits, model(torch.tensor([[5, 6]])))


def test_memory_layout_does_not_change_the_hash():
    model = tiny_gemma()
    before = weights_hash(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    assert weights_hash(model) == before


def test_sampled_elements_are_evenly_strided_and_bounded_in_number():
    # 300,000 / 65,536 rounded up is 5, which is odd already: 60,000 elements.
    x = torch.arange(300_000.0).view(500, 600)
    assert torch.equal(_sampled(x), torch.arange(0.0, 300_000, 5))
    # Of a transposed view the logical order counts: element 1 is row 0, column 1.
    assert _sampled(x[:3, :2].T).tolist() == [0, 600, 1200, 1, 601, 1201]
    # 2 ** 18 elements: a stride of 4 would meet a quarter of the columns, 5 meets all of them.
    wide = torch.arange(1024.0).expand(256, 1024)
    assert len(_sampled(wide)) <= SAMPLED
    assert len(_sampled(wide).unique()) == 1024


def test_name_of_a_folder_is_its_last_part(tmp_path):
    hf = tiny_hf()
    names, hashes = set(), set()
    for parent in ("here", "there"):
        folder = tmp_path / parent / "mine"
        hf.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        model = load_model(str(folder), device="cpu")
        names.add(name_of(model))
        hashes.add(weights_hash(model))
    assert names == {"mine"}
    assert len(hashes) == 1
