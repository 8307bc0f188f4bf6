"""What the README tells a new user to type."""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from helpers import lenient, small_loop

import shl
from shl.models.tiny import tiny_gemma

README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")


@pytest.fixture
def snippet():
    (section,) = re.findall(r"## Inside a run\n(.*?)\n## ", README, re.DOTALL)
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return code


def test_from_import_to_a_picture_of_cosines_in_under_thirty_lines(
    snippet, monkeypatch, tmp_path, capsys
):
    assert len(snippet.strip().splitlines()) < 30
    lenient(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shl, "load_model", lambda name: tiny_gemma())
    monkeypatch.setattr(shl, "LoopConfig", lambda rounds: small_loop(rounds=rounds))
    space = {}
    exec(compile(snippet, "README", "exec"), space)
    assert len(space["ledger"].rounds) == 3
    # Layer 1 of the tiny Gemma sees 8 tokens back, not as far as the persona: no direction there.
    assert np.isfinite(space["ledger"].grid("to_first")[1:]).all()
    assert capsys.readouterr().out.startswith("love on tiny-gemma, 3 rounds")
    assert plt.imread(tmp_path / "cosines.png").shape[0] > 200


def test_the_targets_that_the_readme_names_exist():
    makefile = (Path(__file__).parents[2] / "Makefile").read_text("utf-8")
    named = set(re.findall(r"make ([a-z]+)", README))
    assert {"docs", "experiment", "test"} <= named
    assert named <= set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE)) | {"and"}
