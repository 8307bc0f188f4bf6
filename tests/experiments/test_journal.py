"""Journals: checksums, torn ends, full disks, folders that cannot be written or are gone."""

import hashlib
import json
import resource
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers import one_sentence
from hypothesis import given
from hypothesis import strategies as st

from experiments.record.journal import Journal, lock, read_lines, write
from experiments.record.reader import FILES
from experiments.record.writer import RecordWriter, text_lines
from shl.method.filters import Verdict
from shl.models.generate import Completion
from shl.models.tokens import Prompt
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


def test_lines_are_read_back_and_appended(path):
    assert read_lines(path) == LINES
    journal = Journal(path)
    journal.append([{"d": 4}, {"e": 5}])
    assert journal.lines == read_lines(path) == [*LINES, {"d": 4}, {"e": 5}]
    assert all(json.loads(line)["check"] for line in path.read_text("utf-8").split("\n")[:-1])


@given(cut=st.integers(0, 200))
def test_truncated_file_keeps_its_complete_lines(cut, tmp_path_factory):
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


@pytest.mark.parametrize("char", ["\u2028", "\u2029", "\x85", "\n", "\0"])
def test_text_with_a_line_separator_is_read_back(tmp_path, char):
    record = RecordWriter(tmp_path / "run", {name: {} for name in FILES})
    c = Completion(Prompt("?"), f"one{char}two", (5,), (2,))
    record.event("probe", 0, {}, text_lines("probe", 0, [Verdict(c, (), 2.0, 2.0)]))
    record.close()
    assert read_lines(tmp_path / "run" / "texts.jsonl")[0]["text"] == c.text


@given(data=st.data())
def test_any_changed_byte_is_detected(data, tmp_path_factory):
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


def test_missing_or_swapped_lines_are_detected(path):
    first, second, third, _ = path.read_bytes().split(b"\n")
    for lines in ([second, third], [first, third], [second, first, third]):
        path.write_bytes(b"\n".join([*lines, b""]))
        with pytest.raises(ShlError, match="checksum mismatch in line"):
            read_lines(path)


def test_lines_beyond_keep_are_truncated(path):
    journal = Journal(path, keep=1)
    assert journal.lines == read_lines(path) == LINES[:1]
    with pytest.raises(ShlError, match="has 1 lines, it must have at least 2"):
        Journal(path, keep=2)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_non_finite_numbers_are_rejected(number, path):
    with pytest.raises(ValueError, match="JSON"):
        Journal(path).append([{"x": float(number)}])
    path.write_text(f'{{"x": {number}, "check": "0123456789abcdef"}}\n')
    with pytest.raises(ShlError, match="is not a JSON number"):
        read_lines(path)


def test_append_on_a_full_disk_leaves_the_journal_unchanged(path):
    journal = Journal(path)
    with pytest.raises(ShlError) as error, full_disk():
        journal.append([{"text": "x" * 5000}])
    assert "lines.jsonl cannot be written (File too large)" in one_sentence(error)
    assert read_lines(path) == LINES
    journal.append([{"small": 1}])
    assert read_lines(path) == [*LINES, {"small": 1}]


def test_write_on_a_full_disk_leaves_the_old_file(tmp_path):
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


@pytest.mark.parametrize(
    "use",
    [
        lambda: RecordWriter(Path("/proc/runs/one"), {}),
        lambda: Journal(Path("/proc/lines.jsonl")).append(LINES),
        lambda: write(Path("/proc/table.md"), "x"),
        lambda: lock(Path("/proc")),
    ],
)
def test_unwritable_folder_is_rejected(use):
    # No user, root included, may make files in /proc.
    with pytest.raises(ShlError) as error:
        use()
    assert "cannot be written" in one_sentence(error)


def test_deleted_folder_is_not_created_again(path):
    journal = Journal(path)
    shutil.rmtree(path.parent)
    with pytest.raises(ShlError) as error:
        journal.append(LINES)
    assert "cannot be written (No such file or directory)" in one_sentence(error)
    assert not path.parent.exists()


def test_folder_with_other_files_is_rejected(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ShlError, match="holds something else"):
        RecordWriter(tmp_path, {})
    with pytest.raises(ShlError, match="cannot be written"):
        RecordWriter(tmp_path / "thesis.tex", {})
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_every_checksum_covers_the_lines_before(tmp_path):
    """A line written to another beginning, or later on, is not the same line."""
    first, second = Journal(tmp_path / "one"), Journal(tmp_path / "two")
    first.append([{"a": 1}, {"b": 2}])
    second.append([{"a": 3}])
    second.append([{"b": 2}])
    one, two = ((tmp_path / name).read_bytes().splitlines(keepends=True) for name in ("one", "two"))
    assert one[1] != two[1]
    chain = ""
    for line in one:
        body = line.decode().rsplit(', "check"', 1)[0]
        chain = hashlib.sha256((chain + body).encode()).hexdigest()[:16]
        assert json.loads(line)["check"] == chain
    (tmp_path / "two").write_bytes(two[0] + one[1])
    with pytest.raises(ShlError, match="checksum mismatch in line 2"):
        read_lines(tmp_path / "two")
