"""Local Hugging Face folders load or are rejected with one sentence."""

import shutil

import pytest
import torch
from helpers import save, tiny_llama_hf, tokens_of
from safetensors.torch import load_file, save_file
from transformers import GPT2Config

from shl.models.load import build_model, load_model
from shl.models.tiny import tiny_hf, tiny_tokenizer
from shl.models.tokens import encode
from shl.utils.errors import ShlError

TOKENS = tokens_of(2, 20)


@pytest.mark.parametrize("make", [tiny_hf, tiny_llama_hf])
def test_local_folder_loads(make, tmp_path):
    hf = make()
    model = load_model(str(save(tmp_path, hf)), device="cpu")
    assert (model(TOKENS) - hf(TOKENS).logits).abs().max() <= 1e-4
    assert encode(model, "Hi?")[0] == model.tokenizer.bos_token_id == 2
    assert model.tokenizer.decode(encode(model, "Hi?")) == "<bos>Q: Hi?\nA:"
    assert model.cfg.model_name == str(tmp_path)


def test_sharded_weights_load(tmp_path):
    hf = tiny_hf()
    save(tmp_path, hf, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model = load_model(str(tmp_path), device="cpu")
    assert torch.equal(model(TOKENS), build_model(hf.config, hf.state_dict(), None)(TOKENS))


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path, tiny_hf())


def message(folder):
    with pytest.raises(ShlError) as error:
        load_model(str(folder), device="cpu")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_truncated_weights_are_rejected(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "cannot be read" in message(folder)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "cannot be read"),
        ("tokenizer.json", "cannot be read"),
    ],
)
def test_missing_file_is_rejected(folder, name, reason):
    (folder / name).unlink()
    assert reason in message(folder)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "cannot be read"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "cannot be read"),
        ("{}", "has no weight_map"),
        ("[]", "has no weight_map"),
        ('{"weight_map": {"a": 3}}', "has no weight_map"),
        ('{"weight_map": {"a": "../outside.safetensors"}}', "outside its folder"),
    ],
)
def test_broken_index_is_rejected(folder, text, reason):
    shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(text)
    assert reason in message(folder)


@pytest.mark.parametrize("error", [AttributeError, TypeError, RuntimeError])
def test_error_of_this_package_is_not_attributed_to_the_folder(folder, monkeypatch, error):
    def broken(*args, **kwargs):
        raise error("a defect")

    monkeypatch.setattr("shl.models.load.converter", broken)
    with pytest.raises(error, match="a defect"):
        load_model(str(folder), device="cpu")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s.pop("model.norm.weight"), "have no tensor model.norm.weight"),
        (lambda s: s.pop("model.embed_tokens.weight"), "have no embed_tokens.weight"),
        (
            lambda s: s.update({"model.layers.1.mlp.up_proj.weight": torch.ones(47, 32)}),
            "blocks.1.mlp.W_in have shape (32, 47)",
        ),
        (
            lambda s: s.update({"model.layers.1.self_attn.q_proj.weight": torch.ones(48, 32)}),
            "blocks.1.attn.W_Q have shape (3, 32, 16)",
        ),
    ],
)
def test_missing_tensor_or_wrong_shape_is_rejected(folder, change, reason):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert reason in message(folder)


def test_unsupported_architecture_is_rejected(tmp_path):
    GPT2Config().save_pretrained(tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    tiny_tokenizer().save_pretrained(tmp_path)
    assert "'gpt2', it must be one of gemma3, gemma3_text, llama" in message(tmp_path)
