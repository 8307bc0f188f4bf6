"""Whatever a model writes, the record can be read again."""

import pytest

from experiments.folder import read
from experiments.record import Record
from shl.filters import Verdict
from shl.generate import Completion
from shl.tokens import Prompt


@pytest.mark.parametrize("char", ["\u2028", "\u2029", "\x85", "\n", "\0"])
def test_any_text_survives_the_record(tmp_path, char):
    record = Record(tmp_path / "run", {}, "cpu")
    c = Completion(Prompt("?"), f"one{char}two", (5,), (2,))
    record.texts("base", -1, [Verdict(c, (), 2.0, 2.0)])
    assert read(tmp_path / "run")[2][0]["text"] == c.text
