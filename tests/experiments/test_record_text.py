"""Whatever a model writes, the record can be read again."""

import pytest

from experiments.record.journal import read_lines
from experiments.record.reader import FILES
from experiments.record.writer import RecordWriter, text_lines
from shl.method.filters import Verdict
from shl.models.generate import Completion
from shl.models.tokens import Prompt


@pytest.mark.parametrize("char", ["\u2028", "\u2029", "\x85", "\n", "\0"])
def test_any_text_survives_the_record(tmp_path, char):
    record = RecordWriter(tmp_path / "run", {name: {} for name in FILES})
    c = Completion(Prompt("?"), f"one{char}two", (5,), (2,))
    record.event("probe", 0, {}, text_lines("probe", 0, [Verdict(c, (), 2.0, 2.0)]))
    record.close()
    assert read_lines(tmp_path / "run" / "texts.jsonl")[0]["text"] == c.text
