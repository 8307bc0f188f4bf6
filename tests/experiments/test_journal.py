"""Journals: checksums, torn ends, full disks, folders that cannot be written or are gone."""

import json
import resource
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import one_sentence
from hypothesis import given
from hypothesis import strategies as st

from experiments.record.journal import Journal, lock, read_lines, write
from experiments.record.writer import RecordWriter
from shl.utils.errors import ShlError
from shl.utils.files import write_safetensors

LINES = [{"a": 1, "text": "one\u2028two"}, {"a": 2.5, "b": None}, {"c": [1, "x"]}]


@pytest.fixture
def path(tmp_path):
    journal = Journal(tmp_path / "lines.jsonl")
    for line in LINES:
        journal.append([line])
    return journal.path


@contextmanager
def full_disk():
    """A file may grow to 4000 bytes and no more; the kernel writes what fits and then refuses.

    Not a fixture: pytest reports before it tears down, and its own output may be a longer file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_lines_come_back_and_more_can_follow(path):
    assert read_lines(path) == LINES
    journal = Journal(path)
    journal.append([{"d": 4}, {"e": 5}])
    assert journal.lines == read_lines(path) == [*LINES, {"d": 4}, {"e": 5}]
    assert all(json.loads(line)["check"] for line in path.read_text("utf-8").split("\n")[:-1])


@given(cut=st.integers(0, 200))
def test_cut_anywhere_it_keeps_its_whole_lines(cut, tmp_path_factory):
    path = tmp_path_factory.mktemp("cut") / "lines.jsonl"
    Journal(path).append(LINES)
    data = path.read_bytes()
    cut = min(cut, len(data))
    path.write_bytes(data[:cut])
    whole = data[:cut].count(b"\n")
    assert read_lines(path) == LINES[:whole]
    journal = Journal(path)
    journal.append(LINES[whole:])
    assert path.read_bytes() == data


@given(data=st.data())
def test_no_changed_byte_passes(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("flip") / "lines.jsonl"
    Journal(path).append(LINES)
    raw = bytearray(path.read_bytes())
    # A changed last byte is a line without its end, which counts as never written.
    at = data.draw(st.integers(0, len(raw) - 2))
    raw[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(raw)
    with pytest.raises(ShlError) as error:
        read_lines(path)
    assert "of " in one_sentence(error)


def test_lines_cannot_be_left_out_or_swapped(path):
    first, second, third, _ = path.read_bytes().split(b"\n")
    for lines in ([second, third], [first, third], [second, first, third]):
        path.write_bytes(b"\n".join([*lines, b""]))
        with pytest.raises(ShlError, match="checksum mismatch in line"):
            read_lines(path)


def test_lines_after_those_to_keep_are_cut_off(path):
    journal = Journal(path, keep=1)
    assert journal.lines == read_lines(path) == LINES[:1]
    with pytest.raises(ShlError, match="has 1 lines, it must have at least 2"):
        Journal(path, keep=2)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_does_not_know_are_refused(number, path):
    with pytest.raises(ValueError, match="JSON"):
        Journal(path).append([{"x": float(number)}])
    path.write_text(f'{{"x": {number}, "check": "0123456789abcdef"}}\n')
    with pytest.raises(ShlError, match="is not a JSON number"):
        read_lines(path)


def test_a_full_disk_stops_with_a_sentence_and_leaves_what_was_there(path):
    journal = Journal(path)
    with pytest.raises(ShlError) as error, full_disk():
        journal.append([{"text": "x" * 5000}])
    assert "lines.jsonl cannot be written (File too large)" in one_sentence(error)
    assert read_lines(path) == LINES
    journal.append([{"small": 1}])
    assert read_lines(path) == [*LINES, {"small": 1}]


def test_a_full_disk_leaves_the_old_file_whole(tmp_path):
    import torch

    path = tmp_path / "table.md"
    write(path, "old")
    with pytest.raises(ShlError, match="cannot be written"), full_disk():
        write(path, "y" * 5000)
    tensors = tmp_path / "v.safetensors"
    write_safetensors(tensors, "f", {"x": torch.ones(2)}, {})
    before = tensors.read_bytes()
    with pytest.raises(ShlError, match="cannot be written"), full_disk():
        write_safetensors(tensors, "f", {"x": torch.ones(2000)}, {})
    assert path.read_text() == "old"
    assert tensors.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["table.md", "v.safetensors"]


def test_a_folder_that_cannot_be_written_is_a_sentence():
    # No user, root included, may make files there.
    with pytest.raises(ShlError) as error:
        RecordWriter(Path("/proc/runs/one"), {})
    assert "cannot be written" in one_sentence(error)
    with pytest.raises(ShlError, match="cannot be written"):
        Journal(Path("/proc/lines.jsonl")).append(LINES)
    with pytest.raises(ShlError, match="cannot be written"):
        write(Path("/proc/table.md"), "x")
    with pytest.raises(ShlError, match="cannot be written"):
        lock(Path("/proc"))


def test_a_folder_that_vanished_is_not_made_again(path):
    journal = Journal(path)
    shutil.rmtree(path.parent)
    with pytest.raises(ShlError) as error:
        journal.append(LINES)
    assert "cannot be written (No such file or directory)" in one_sentence(error)
    assert not path.parent.exists()


def test_a_folder_with_something_else_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ShlError, match="holds something else"):
        RecordWriter(tmp_path, {})
    with pytest.raises(ShlError, match="cannot be written"):
        RecordWriter(tmp_path / "thesis.tex", {})
    assert (tmp_path / "thesis.tex").read_text() == "precious"
