"""Answers that rest on the cloze and on the use of context, on constructed records."""

from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
import torch
from records import run, scores
from rich.console import Console

from experiments.checks.validity import ProbeConfig, odd_and_even, show_items
from experiments.questions.answers import answer_all
from experiments.report.tables import rows
from shl.config import EvalConfig
from shl.hooks.handle import handles_on
from shl.hooks.vector import SteeringVector
from shl.measure.continuations import Cloze, cloze_shift, context_use
from shl.method.axes import load_axis
from shl.models.tiny import tiny_gemma

AXIS = load_axis("care_auth")
CONFIG = EvalConfig(bootstrap=200)
# Openings lie 0, 1, 2 and 3 nats apart from each other, conflicts at 4 to 8 nats.
OPENINGS, CONFLICTS = np.arange(4.0), np.linspace(4.0, 8.0, 5)


def items(name, stage, values):
    line = {"event": "items", "instrument": name, "stage": stage["stage"]}
    return line | {"round": stage["round"], "items": list(values), "value": 0.0}


def record(*, shifts, ratios, **more):
    """A run whose vignettes show nothing, with constant shifts and ratios by (stage, round)."""
    events, texts = run(steered=scores(), healed=(scores(), scores()), plus={}, minus={}, **more)
    found = []
    for e in events:
        found.append(e)
        if e["event"] == "stage":
            key = (e["stage"], e["round"])
            found.append(items("cloze", e, OPENINGS + shifts.get(key, 0.0)))
            found.append(items("context", e, CONFLICTS * ratios.get(key, 1.0)))
    return found, texts


GOOD = {
    ("prompted+", -1): 1.0, ("prompted-", -1): -2.0, ("steered", 0): 4.0, ("healed", 0): 3.0,
    ("steered", 1): 5.0, ("healed", 1): 3.5,
}  # fmt: skip
BROKEN = {("steered", 0): 0.5}


def answers(found):
    return {a.key: a for a in answer_all(*found, AXIS, CONFIG)}


def value(answer, what, index=None):
    (found,) = [
        f
        for f in answer.figures["decided"]
        if f["what"].startswith(what) and f["round"] in (index, None)
    ]
    assert found["low"] == pytest.approx(found["value"]) == pytest.approx(found["high"])
    return found["value"]


def test_trait_and_coherence_are_those_of_the_items():
    found = answers(record(shifts=GOOD, ratios=BROKEN))
    # 3 less half of 4, and 3.5 less the larger of 1 and half of 1 - -2.
    assert value(found["Q1"], "healed on-axis shift less 0.5 x steered") == pytest.approx(1.0)
    assert value(found["Q1"], "steered use of context short of") == pytest.approx(0.97 - 0.5)
    assert value(found["prompting"], "on-axis shift less", 1) == pytest.approx(2.0)
    assert value(found["Q2"], "use of context over base's", 1) == pytest.approx(1.0)
    assert found["Q3"].figures["shifts"] == pytest.approx([3.0, 3.5])
    assert {a.verdict for key, a in found.items() if key in ("Q1", "Q2", "Q3", "worked")} == {"yes"}
    assert found["selective"].verdict == "info"
    assert found["readable"].figures == {"decided": [], "context": True}


@pytest.mark.parametrize(
    ("ratio", "verdict"), [(0.98, "yes"), (0.96, "no")], ids=["above 0.97", "below 0.97"]
)
def test_coherence_is_decided_by_the_use_of_context(ratio, verdict):
    found = answers(record(shifts=GOOD, ratios=BROKEN | {("healed", 1): ratio}))
    assert found["Q2"].verdict == verdict


def test_a_cloze_that_does_not_separate_the_personas_is_not_used():
    """Then the vignettes count, whose shifts are 0."""
    # Three of four openings differ by 3 nats, the last by -0.1.
    shifts = GOOD | {("prompted-", -1): np.array([-2.0, -2.0, -2.0, 1.1])}
    found = answers(record(shifts=shifts, ratios=BROKEN))
    assert found["Q3"].figures["shifts"] == pytest.approx([0.0, 0.0])
    assert found["selective"].verdict != "info"


@pytest.mark.parametrize(
    ("minus", "verdicts"),
    [((-2.0,), {"yes"}), ((-2.0, -2.0, -2.0, 1.1), {"undecided"})],
    ids=["valid", "not valid"],
)
def test_an_axis_without_foundations_has_the_shifts_of_its_cloze_in_any_case(minus, verdicts):
    silent = replace(AXIS, expected={})
    found = record(shifts=GOOD | {("prompted-", -1): np.array(minus)}, ratios=BROKEN)
    found = {a.key: a for a in answer_all(*found, silent, CONFIG)}
    assert found["Q3"].figures["shifts"] == pytest.approx([3.0, 3.5])
    assert {found[key].verdict for key in ("Q1", "Q3", "prompting")} == verdicts
    assert found["readable"].verdict == ("yes" if verdicts == {"yes"} else "no")
    assert found["selective"].verdict == "info"


def test_conflicts_that_base_does_not_follow_are_not_used():
    events, texts = record(shifts=GOOD, ratios=BROKEN)
    for e in events:
        if e.get("instrument") == "context" and e["stage"] == "base":
            e["items"] = [4.0, 5.0, 6.0, 7.0, -0.1]  # one in five, though not on average
    found = answers((events, texts))
    assert "valid-answer mass" in found["Q2"].figures["decided"][0]["what"]
    assert found["readable"].figures["context"] is False


def test_statistics_by_hand():
    pairs = np.array([[1.0, 2.0], [3.0, 5.0]])
    assert context_use(pairs) == pytest.approx(3.5 / 2)
    assert cloze_shift(pairs) == pytest.approx(1.5)


def test_the_table_has_a_column_for_each_instrument():
    base = {
        "event": "stage", "stage": "base", "round": -1, "nats": {"care": 0, "authority": 0},
        "coherence": 1.0, "survival": 1.0, "perplexity": 9.0, "noise": [],
    }  # fmt: skip
    read = items("context", base, CONFLICTS) | {"value": 1.0}
    [row] = rows([base, read, items("cloze", base, OPENINGS) | {"value": -0.25}])
    assert (row["S / base"], row["cloze"]) == ("1.00", "-0.25")


def test_love_brings_a_cloze_and_care_auth_none():
    cloze = load_axis("love").cloze
    assert isinstance(cloze, Cloze)
    assert len(cloze.openings) == 24
    assert len(cloze.positive) == len(cloze.negative)
    assert AXIS.cloze is None
    assert replace(AXIS, cloze=cloze).cloze is cloze


def test_odd_and_even_parts_by_hand():
    """A reading of 3 d + d^2 + 7 at dose d has an odd part of 3 d and an even part of d^2."""
    model = tiny_gemma()
    vector = SteeringVector({1: torch.ones(32)}, "tiny", "demo", 1)

    def read(model):
        dose = sum(handle.dose for handle in handles_on(model))
        return np.array([3 * dose + dose**2 + 7])

    assert odd_and_even(model, read, vector, 2.0) == pytest.approx((6.0, 4.0))


def test_probe_prints_doses_and_random_vectors():
    console = Console(width=200, record=True, file=StringIO())
    axis = replace(load_axis("love"), contexts=("Tea?", "Rain?"), prompts=("Hello?",))
    show_items(console, ProbeConfig(nulls=2, dose=4.0), tiny_gemma(), axis)
    text = console.export_text()
    for part in ("over 40 conflicts", "of 24 openings", "random vector 1:", "beyond chance"):
        assert part in text
    show_items(console, ProbeConfig(), tiny_gemma(), load_axis("care_auth"))
    assert "has no cloze" in console.export_text()
