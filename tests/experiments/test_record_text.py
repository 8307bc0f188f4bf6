"""Whatever a model writes, the record can be read again."""

import pytest

from experiments.record.journal import read_lines
from experiments.record.reader import FILES
from experiments.record.writer import Record
from shl.config import DoseConfig
from shl.method.dose import start
from shl.method.filters import Verdict
from shl.models.generate import Completion
from shl.models.tokens import Prompt


@pytest.mark.parametrize("char", ["\u2028", "\u2029", "\x85", "\n", "\0"])
def test_any_text_survives_the_record(tmp_path, char):
    record = Record(tmp_path / "run", {name: {} for name in FILES})
    c = Completion(Prompt("?"), f"one{char}two", (5,), (2,))
    walk = start(DoseConfig(rungs=1))
    record.event("base", -1, {})
    record.observe("probe", 0, {"verdicts": [Verdict(c, (), 2.0, 2.0)], "walk": walk})
    record.lock.release()
    assert read_lines(tmp_path / "run" / "texts.jsonl")[0]["text"] == c.text
