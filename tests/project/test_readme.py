"""The code and the make targets of the README."""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from helpers import lenient, small_loop

import shl
from shl.models.tiny import tiny_gemma

README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")


def test_snippet_plots_cosines_in_under_thirty_lines(monkeypatch, tmp_path, capsys):
    (section,) = re.findall(r"## Inside a run\n(.*?)\n## ", README, re.DOTALL)
    (snippet,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(snippet.strip().splitlines()) < 30
    lenient(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shl, "load_model", lambda name: tiny_gemma())
    monkeypatch.setattr(shl, "LoopConfig", lambda rounds: small_loop(rounds=rounds))
    space = {}
    exec(compile(snippet, "README", "exec"), space)
    assert len(space["ledger"].rounds) == 3
    # The window of the tiny Gemma's first layers, 8 tokens, does not reach the persona.
    assert np.isfinite(space["ledger"].grid("to_first")[1:]).all()
    assert capsys.readouterr().out.startswith("love on tiny-gemma, 3 rounds")
    assert plt.imread(tmp_path / "cosines.png").shape[0] > 200


def test_make_targets_of_the_readme_exist():
    makefile = (Path(__file__).parents[2] / "Makefile").read_text("utf-8")
    named = set(re.findall(r"make ([a-z]+)", README))
    assert {"docs", "experiment", "test"} <= named
    assert named <= set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE)) | {"and"}
