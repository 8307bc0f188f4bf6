"""Whatever a model writes, the record can be read again."""

import pytest

from experiments.folder import FILES
from experiments.journal import read_lines
from experiments.record import Record
from shl.config import DoseConfig
from shl.dose import start
from shl.filters import Verdict
from shl.generate import Completion
from shl.tokens import Prompt


@pytest.mark.parametrize("char", ["\u2028", "\u2029", "\x85", "\n", "\0"])
def test_any_text_survives_the_record(tmp_path, char):
    record = Record(tmp_path / "run", {name: {} for name in FILES})
    c = Completion(Prompt("?"), f"one{char}two", (5,), (2,))
    walk = start(DoseConfig(rungs=1))
    record.event("base", -1, {})
    record.observe("probe", 0, {"verdicts": [Verdict(c, (), 2.0, 2.0)], "walk": walk})
    record.lock.release()
    assert read_lines(tmp_path / "run" / "texts.jsonl")[0]["text"] == c.text
