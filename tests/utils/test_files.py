"""Metadata and checksums of files are validated when they are read."""

import json
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from helpers import one_sentence, random_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from shl.hooks.adapter import Adapter
from shl.hooks.bake import stack
from shl.hooks.fingerprint import weights_hash
from shl.hooks.vector import SteeringVector
from shl.method.axes import load_axis
from shl.method.extract import extract_vector
from shl.models.tiny import tiny_gemma
from shl.utils.errors import ShlError
from shl.utils.files import identity, read_safetensors, write_safetensors

HUGE = 10**400


def metadata_of(path):
    with safe_open(str(path), "pt") as file:
        return json.loads(file.metadata()["shl"])


def write_signed(path, meta, tensors=None):
    """Write metadata (and tensors) as they are, with the identity that fits them."""
    tensors = load_file(path) if tensors is None else tensors
    if isinstance(meta, dict):
        meta = {k: v for k, v in meta.items() if k != "identity"}
        meta["identity"] = identity(tensors, meta)
    save_file(tensors, path, metadata={"shl": json.dumps(meta)})


@pytest.fixture(scope="module")
def model():
    return tiny_gemma()


@pytest.fixture
def adapter_file(model, tmp_path):
    path = tmp_path / "a.safetensors"
    replace(random_adapter(model, ["q", "down"], (1, 2)), round=2, axis="love").save(path)
    return path


@pytest.fixture
def vector_file(model, tmp_path):
    path = tmp_path / "v.safetensors"
    extract_vector(model, load_axis("love"), [1, 2], contexts=2, round=1).save(path)
    return path


def test_metadata_of_an_adapter(model, adapter_file):
    meta = metadata_of(adapter_file)
    meta.pop("identity")
    sites = meta.pop("sites")
    assert meta == {
        "format": "shl-adapter-3",
        "model": "tiny-gemma",
        "weights": weights_hash(model),
        "dtype": "float32",
        "axis": "love",
        "round": 2,
        "scale": 2.0,  # alpha 6 at rank 3
        "rank": 3,
        "alpha": 6.0,
    }
    assert sites[1] == ["down", 1, 48, 32, 3, "blocks.1.mlp.hook_post", "blocks.1.mlp"]
    assert len(sites) == 4


def test_metadata_of_a_vector(model, vector_file):
    meta = metadata_of(vector_file)
    meta.pop("identity")
    assert meta == {
        "format": "shl-vector-3",
        "model": "tiny-gemma",
        "weights": weights_hash(model),
        "dtype": "float32",
        "axis": "love",
        "round": 1,
        "contexts": 2,
        "rule": "mean_difference",
        "token": "last prompt token",
        "hooks": ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"],
    }


def test_a_file_read_without_a_model_is_saved_to_the_same_bytes(
    adapter_file, vector_file, tmp_path
):
    for path, kind, read in (
        (adapter_file, Adapter, Adapter.read),
        (vector_file, SteeringVector, SteeringVector.load),
    ):
        again = read(path)
        assert isinstance(again, kind)
        again.save(tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == path.read_bytes()
        assert again.identity() == metadata_of(path)["identity"]


def test_a_stack_of_two_ranks_can_be_saved_and_loaded(model, tmp_path):
    both = stack([random_adapter(model, ["q"], (1,)), random_adapter(model, ["q", "o"], (1,))])
    both.save(tmp_path / "both")
    meta = metadata_of(tmp_path / "both")
    assert (meta["rank"], meta["alpha"], meta["weights"]) == (None, None, weights_hash(model))
    assert Adapter.load(tmp_path / "both", model).ranks == {"blocks.1.o": 3, "blocks.1.q": 6}


@pytest.mark.parametrize("kind", ["adapter_file", "vector_file"])
def test_other_weights_are_rejected_by_default(kind, request):
    path = request.getfixturevalue(kind)
    load = Adapter.load if kind == "adapter_file" else SteeringVector.load
    tuned = tiny_gemma(seed=1)
    with pytest.raises(ShlError, match=r"with the hash .* any_weights=True") as error:
        load(path, tuned)
    one_sentence(error)
    assert load(path, tuned, any_weights=True).model_name == "tiny-gemma"
    half = tiny_gemma().to(torch.bfloat16)
    with pytest.raises(ShlError, match="in float32, the model is in bfloat16"):
        load(path, half)
    for accept in (False, True):
        other = tiny_gemma()
        other.cfg.model_name = "gemma-9"
        with pytest.raises(ShlError, match="made for tiny-gemma, the model is gemma-9"):
            load(path, other, any_weights=accept)
        with pytest.raises(ShlError, match="layer 2 is out of range"):
            load(path, tiny_gemma(n_layers=2), any_weights=True)
    assert load(path, tiny_gemma()).model_name == "tiny-gemma"


def test_a_vector_of_another_width_is_rejected(model, tmp_path):
    path = tmp_path / "v"
    SteeringVector({1: torch.ones(31)}, "tiny-gemma", "demo", 1).save(path)
    with pytest.raises(ShlError, match="no hash or dtype of the weights"):
        SteeringVector.load(path, model)
    with pytest.raises(ShlError, match=r"shape \(31,\), tiny-gemma has d_model 32"):
        SteeringVector.load(path, model, any_weights=True)


def assert_rejected(load, path, *parts):
    with pytest.raises(ShlError) as error:
        load(path)
    text = one_sentence(error)
    assert all(part in text for part in parts), text


BAD = {
    "model": (None, 3, "a\nb", ["x"]),
    "weights": (3, True, {}),
    "dtype": (3, []),
    "axis": (3, "\ud800"),
    "round": (-1, 2.0, True, "2", HUGE),
}
BAD_ADAPTER = BAD | {
    "scale": (None, 2, "2", float("nan"), float("inf"), HUGE, True, 3.0),
    "rank": (None, 0, -3, 3.0, HUGE),
    "alpha": (None, 6, float("nan"), 7.0),
    "sites": (
        None,
        [],
        {},
        ["q"],
        [["q", 1, 32, 64]],
        [["q", 1, 32, 64, 3, 0, 0]],
        [["x", 1, 32, 64, 3, "", ""]],
        [[["q"], 1, 32, 64, 3, "", ""]],
        [["q", -1, 32, 64, 3, "blocks.-1.attn:query_input", "blocks.-1.attn.hook_q"]],
        [["q", True, 32, 64, 3, "", ""]],
        [["q", HUGE, HUGE, HUGE, HUGE, "", ""]],
        [["q", 1, 32, 64, 0, "blocks.1.attn:query_input", "blocks.1.attn.hook_q"]],
    ),
}
BAD_VECTOR = BAD | {
    "axis": (None, 3),
    "contexts": (None, -1, 2.5, "2", HUGE, True),
    "rule": (3, []),
    "token": (3, {}),
    "hooks": (None, [], ["blocks.1.hook_resid_post"], [1, 2], "x"),
}


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [("adapter_file", k, v) for k, values in BAD_ADAPTER.items() for v in values]
    + [("vector_file", k, v) for k, values in BAD_VECTOR.items() for v in values],
)
def test_invalid_metadata_is_rejected(kind, key, value, request):
    path = request.getfixturevalue(kind)
    write_signed(path, metadata_of(path) | {key: value})
    assert_rejected(Adapter.read if kind == "adapter_file" else SteeringVector.load, path)


def test_an_adapter_of_rank_zero_is_rejected(adapter_file):
    hooks = ["blocks.1.attn:query_input", "blocks.1.attn.hook_q"]
    changed = {"sites": [["q", 1, 32, 64, 0, *hooks]], "rank": 0, "alpha": 0.0}
    tensors = {"blocks.1.q.A": torch.ones(0, 32), "blocks.1.q.B": torch.ones(64, 0)}
    write_signed(adapter_file, metadata_of(adapter_file) | changed, tensors)
    assert_rejected(Adapter.read, adapter_file, "rank 1 or more")


@pytest.mark.parametrize("kind", ["adapter_file", "vector_file"])
def test_missing_and_unknown_keys_are_rejected_by_name(kind, request):
    path = request.getfixturevalue(kind)
    load = Adapter.read if kind == "adapter_file" else SteeringVector.load
    meta = metadata_of(path)
    for key in set(meta) - {"format", "identity"}:
        write_signed(path, {k: v for k, v in meta.items() if k != key})
        assert_rejected(load, path, key)
    write_signed(path, meta | {"colour": "red"})
    assert_rejected(load, path, "colour")
    for odd in ([], None, 3, "x", {}):
        write_signed(path, odd)
        assert_rejected(load, path, "has format None")
    write_signed(path, meta | {"format": ["a"]})
    assert_rejected(load, path, "has format ['a']")
    for damaged in ("[" * 100_000, "{"):
        save_file(load_file(path), path, metadata={"shl": damaged})
        assert_rejected(load, path, "cannot be read")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "no direction"),
        ({"blocks.3.hook_resid_post": torch.ones(32)}, "hooks"),
        ({"blocks.-1.hook_resid_post": torch.ones(32)}, "keys are"),
        ({"blocks.01.hook_resid_post": torch.ones(32)}, "keys are"),
        ({f"blocks.{HUGE}.hook_resid_post": torch.ones(32)}, "keys are"),
        ({"blocks.1.hook_resid_post": torch.ones(1, 32)}, "(1, 32)"),
        ({"blocks.1.hook_resid_post": torch.tensor(1.0)}, "()"),
        ({"blocks.1.hook_resid_post": torch.ones(32).int()}, "dtype torch.int32"),
        ({"blocks.1.hook_resid_post": torch.ones(32).bool()}, "dtype torch.bool"),
        ({"blocks.1.hook_resid_post": torch.ones(32).to(torch.float8_e5m2)}, "float8_e5m2"),
    ],
)
def test_invalid_tensors_of_a_vector_are_rejected(vector_file, changes, message):
    tensors = load_file(vector_file) | changes if changes else {}
    write_signed(vector_file, metadata_of(vector_file), tensors)
    assert_rejected(SteeringVector.load, vector_file, message)


@given(cut=st.floats(0, 0.9999), flip=st.integers(0, 255))
@settings(max_examples=60, deadline=None)
def test_a_damaged_file_is_rejected(tmp_path_factory, cut, flip):
    path = tmp_path_factory.mktemp("damaged") / "v"
    SteeringVector({1: torch.linspace(0, 1, 8)}, "tiny-gemma", "demo", 1).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(cut * len(whole))])
    assert_rejected(SteeringVector.load, path)
    at = int(cut * len(whole))
    if whole[at] != flip:
        path.write_bytes(whole[:at] + bytes([flip]) + whole[at + 1 :])
        assert_rejected(SteeringVector.load, path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=9,
)


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_random_metadata_is_read_or_rejected(model, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("odd") / "x"
    for thing, read in (
        (random_adapter(model, ["o"], (1,)), Adapter.read),
        (SteeringVector({0: torch.ones(32)}, "tiny-gemma", "demo", 1), SteeringVector.load),
    ):
        thing.save(path)
        meta = metadata_of(path)
        changed = data.draw(st.dictionaries(st.sampled_from(sorted(meta)), JSON, max_size=3))
        write_signed(path, meta | changed)
        with suppress(ShlError):
            read(path).save(path)


def test_a_path_that_is_no_file_is_rejected(tmp_path):
    assert_rejected(SteeringVector.load, tmp_path, "cannot be read")
    assert_rejected(Adapter.read, tmp_path / "\0", "cannot be read")


def test_invalid_contents_are_not_written(model, tmp_path):
    path = tmp_path / "x"
    vector = SteeringVector({1: torch.ones(3)}, "m", "a", 1)
    for bad in (
        replace(vector, directions={1: torch.tensor([1.0, torch.nan])}),
        replace(vector, axis="two\nlines"),
        replace(vector, contexts=-1),
        replace(random_adapter(model, ["q"], (1,)), scale=float("nan")),
        replace(random_adapter(model, ["q"], (1,)), round=-1),
    ):
        with pytest.raises(ShlError) as error:
            bad.save(path)
        one_sentence(error)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ShlError, match=r"'x' has dtype torch\.int32"):
        write_safetensors(path, "demo-1", {"x": torch.ones(2).int()}, {})
    with pytest.raises(ShlError, match="cannot be written"):
        vector.save(tmp_path / "no" / "folder")


def test_plain_tensors_are_written_and_read(tmp_path):
    write_safetensors(tmp_path / "t", "demo-1", {"x": torch.ones(2)}, {"n": 3})
    meta, tensors = read_safetensors(tmp_path / "t", "demo-1", {"n": (int,)})
    assert (meta, tensors["x"].tolist()) == ({"n": 3}, [1, 1])
