"""The comparison of test-time control: equal mean doses, and what each arm really applied."""

import numpy as np
import pytest
from helpers import lenient
from rich.console import Console

from experiments import control as program
from experiments.control import compare
from experiments.control_arms import ControlConfig
from experiments.control_told import on_axis
from shl.axes import load_axis
from shl.tiny import tiny_gemma


@pytest.fixture
def arms(monkeypatch):
    lenient(monkeypatch)
    monkeypatch.setattr(program, "load_model", lambda name: tiny_gemma())
    config = ControlConfig(doses=(0.8,), samples=4, max_new_tokens=12, contexts=3, show=1)
    console = Console(width=200, record=True)
    found = compare(config, console)
    return {arm.name: arm for arm in found}, console.export_text()


def test_arms_have_the_mean_dose_that_was_asked_for(arms):
    by_name, text = arms
    assert list(by_name) == ["base", "plain", "gate", "layers", "decay"]
    assert by_name["base"].applied == 0
    assert by_name["plain"].applied == pytest.approx(0.8)
    for name in ("gate", "layers", "decay"):
        assert by_name[name].applied == pytest.approx(0.8, abs=0.15)
    # Constants per layer are the gate's means, and do not vary by token.
    gate, layers = by_name["gate"], by_name["layers"]
    assert np.allclose(layers.by_layer, gate.by_layer)
    assert layers.spread.max() < 1e-5 < gate.spread.min()
    # Every answer has its first two tokens: 2 ** (-n / 20) for n = 1 and 2.
    decay = by_name["decay"]
    assert decay.between(0, 1) / decay.between(1, 2) == pytest.approx(2**0.05, rel=1e-3)
    assert decay.between(0, 3) > decay.between(9, 12)
    for name in by_name:
        assert name in text


def test_base_has_no_shift_and_a_trait_of_zero(arms):
    by_name, _ = arms
    base = by_name["base"]
    assert on_axis(base.reading, base.reading, load_axis("care_auth"))[0] == 0
    assert len(base.trait(base)) == 4
    tokens = np.concatenate(base.along)
    assert tokens.shape[1] == len(by_name["gate"].factors)
    pooled = [(x - tokens.mean(0)) / tokens.std(0) for x in base.along]
    assert np.concatenate(pooled).mean() == pytest.approx(0, abs=1e-4)
