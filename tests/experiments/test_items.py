"""Answers that rest on the cloze and on the use of context, on constructed records."""

from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
import torch
from helpers import one_sentence, small_loop
from pydantic import ValidationError
from records import run, scores, tiny_runs
from rich.console import Console

from experiments.checks.validity import ProbeConfig, odd_and_even, readings, show_items
from experiments.questions.answers import answer_all
from experiments.questions.measurements import Measurements
from experiments.record.reader import read
from experiments.record.schema import NullsEvent
from experiments.record.settings import RunConfig
from experiments.report.tables import rows
from experiments.run import random_vectors, study
from shl.config import FOUNDATIONS, EvalConfig, LoopConfig
from shl.hooks.handle import handles_on
from shl.hooks.vector import SteeringVector
from shl.measure import continuations
from shl.measure.continuations import Cloze, cloze_shift, context_use, read_cloze
from shl.measure.nulls import Nulls
from shl.measure.vignettes import evaluate
from shl.method.axes import load_axis
from shl.models.tiny import tiny_gemma
from shl.utils.errors import ShlError

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
    assert found["Q1"].figures["broken"]["value"] == pytest.approx(0.9 - 0.5)
    assert value(found["prompting"], "on-axis shift less", 1) == pytest.approx(2.0)
    assert value(found["Q2"], "use of context over base's", 1) == pytest.approx(1.0)
    assert found["Q3"].figures["shifts"] == pytest.approx([3.0, 3.5])
    assert {a.verdict for key, a in found.items() if key in ("Q1", "Q2", "Q3", "worked")} == {"yes"}
    assert found["selective"].verdict == "info"
    assert found["readable"].figures == {"decided": [], "context": True}


@pytest.mark.parametrize(
    ("ratio", "verdict"), [(0.91, "yes"), (0.89, "no")], ids=["above 0.9", "below 0.9"]
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


def test_stages_with_different_numbers_of_items_are_refused():
    events, texts = record(shifts=GOOD, ratios={})
    (line,) = [e for e in events if e.get("instrument") == "context" and e["stage"] == "base"]
    line["items"].pop()
    with pytest.raises(ShlError) as error:
        answers((events, texts))
    assert "the readings of context have [4, 5] items" in one_sentence(error)


def test_statistics_by_hand():
    pairs = np.array([[1.0, 2.0], [3.0, 5.0]])
    assert context_use(pairs) == pytest.approx(3.5 / 2)
    assert cloze_shift(pairs) == pytest.approx(1.5)


def stage_line(name, index):
    return {
        "event": "stage", "stage": name, "round": index, "nats": {"care": 0, "authority": 0},
        "coherence": 1.0, "survival": 1.0, "perplexity": 9.0, "noise": [],
    }  # fmt: skip


def test_the_table_has_a_column_for_each_instrument():
    base = stage_line("base", -1)
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


def test_probe_prints_doses_and_random_vectors(monkeypatch, tmp_path):
    monkeypatch.setenv("SHL_CACHE", str(tmp_path))
    console = Console(width=200, record=True, file=StringIO())
    few = continuations.conflict_items()[:4]
    monkeypatch.setattr(continuations, "conflict_items", lambda: few)
    axis = replace(load_axis("love"), contexts=("Tea?", "Rain?"), prompts=("Hello?",))
    both = ProbeConfig(nulls=2, dose=4.0, instruments=("cloze", "trait"))
    show_items(console, both, tiny_gemma(), axis)
    text = console.export_text()
    for name, count in (("cloze", 24), ("trait", 4)):
        assert f"of {count} items" in text
        assert f"the vector moves {name} by" in text
    assert "over 4 conflicts" in text
    assert "beyond chance" in text


def test_the_probe_reads_the_cloze_or_else_the_vignettes():
    love = load_axis("love")
    assert [*readings(love, ())] == ["cloze"]
    (read,) = readings(AXIS, ()).values()
    assert [*readings(AXIS, ())] == ["vignettes"]
    model = tiny_gemma()
    log_p = evaluate(model, config=EvalConfig(vignettes=84)).log_p
    care, authority = (FOUNDATIONS.index(name) for name in ("care", "authority"))
    assert read(model) == pytest.approx((log_p[:, care] - log_p[:, authority]) / 2)
    for axis, name in ((AXIS, "cloze"), (love, "mood")):
        with pytest.raises(ShlError, match=f"there is no instrument '{name}'"):
            readings(axis, (name,))


def with_nulls(found, kl, values, *, instrument="cloze"):
    """The record with KL readings of every stage, and random vectors of these shifts at 1 nat."""
    events, texts = found
    table = {"event": "nulls", "instrument": instrument, "round": -1, "layers": [1]}
    made = [table | {"levels": [1.0], "values": [[[v, -v] for v in values]]}]
    if any(e["event"] == "items" and e["instrument"] == "kl" for e in events):
        return made + events, texts
    for e in events:
        made.append(e)
        if e["event"] == "stage":
            made.append(items("kl", e, [kl, kl]) | {"value": kl})
    return made, texts


@pytest.mark.parametrize(("kl", "valid"), [(0.25, True), (4.0, False)])
def test_a_cloze_that_random_vectors_move_as_far_is_not_valid(kl, valid):
    """Random vectors move it by 3 nats at 1 nat per token: by 1.5 at 0.25, by 6 at 4; the steered
    stage moves it by 4."""
    found = with_nulls(record(shifts=GOOD, ratios=BROKEN), kl, [1.0, -3.0])
    m = Measurements(*found, AXIS, CONFIG)
    assert m.reads_cloze is valid
    assert m.null_interval(m.steered[0]) == pytest.approx((-3 * kl**0.5, 3 * kl**0.5))
    base = stage_line("base", -1)
    lines = [e for e in found[0] if e["event"] == "nulls"]
    [row] = rows([base, items("kl", base, [kl, kl]) | {"value": kl}, *lines])
    assert row["random"] == f"+-{3 * kl**0.5:.2f}"


@pytest.mark.parametrize(("kl", "moved"), [(0.25, 0.3), (4.0, 1.2)])
def test_vignettes_that_random_vectors_move_as_far_are_in_doubt(kl, moved):
    """Random vectors move care by 0.8 and authority by -0.4 nats at 1 nat per token, so that they
    are at (0.8 + 0.4) / 2 on the axis; the steered stage is at 0.5."""
    found = run()
    assert Measurements(*found, AXIS, CONFIG).doubt == ""
    for name in FOUNDATIONS:
        value = {"care": 0.8, "authority": -0.4}.get(name, 3.0)
        found = with_nulls(found, kl, [value, 0.1 * value], instrument=name)
    m = Measurements(*found, AXIS, CONFIG)
    assert m.null_interval(m.steered[0], "axis") == pytest.approx((-moved, moved))
    assert m.null_interval(m.healed[0], "care") == pytest.approx((-0.8 * kl**0.5, 0.8 * kl**0.5))
    assert m.null_interval(m.healed[0]) is None
    assert m.shifts(m.steered[:1]) == pytest.approx([0.5])
    far = "random vectors of the same KL shift the vignettes as far as the first vector"
    assert m.doubt == ("" if moved < 0.5 else far)
    nulls = [e for e in found[0] if e["event"] == "nulls"]
    base = stage_line("base", -1)
    [row] = rows([base, items("kl", base, [kl, kl]) | {"value": kl}, *nulls])
    shown = {"random care": f"+-{0.8 * kl**0.5:.2f}", "random auth": f"+-{0.4 * kl**0.5:.2f}"}
    assert {key: row[key] for key in shown} == shown
    for e in found[0]:
        if e["event"] == "stage" and e["stage"] == "steered":
            e["dose"] = 0.0
    assert Measurements(*found, AXIS, CONFIG).doubt == ""


@pytest.mark.parametrize(
    ("levels", "values"), [([1.0], []), ([1.0, 2.0], [[[0.1, 0.2]]]), ([1.0], [[]]),
                           ([1.0, 2.0], [[[0.1, 0.2]], [[0.1, 0.2], [0.3, 0.4]]])]
)  # fmt: skip
def test_every_level_of_random_vectors_has_as_many(levels, values):
    event = {"event": "nulls", "round": -1, "seconds": 0.0, "cpu": 0.0, "texts": 0}
    event |= {"instrument": "care", "layers": [1]}
    sound = event | {"levels": [1.0, 2.0], "values": [[[0.1, 0.2]], [[0.1, 0.2]]]}
    assert NullsEvent.model_validate(sound).values[1] == [[0.1, 0.2]]
    with pytest.raises(ValidationError):
        NullsEvent.model_validate(event | {"levels": levels, "values": values})


def test_random_vectors_are_read_by_foundation_and_by_the_cloze_if_there_is_one(monkeypatch):
    model, config, cloze = tiny_gemma(), LoopConfig(), load_axis("love").cloze
    asked = []

    def nulls(model, layers, name, content, read, *, count, folder):
        asked.append((tuple(layers), name, count))
        return Nulls((1.0,), np.array([[[read(model), 2 * read(model)]]]))

    monkeypatch.setattr("experiments.run.nulls", nulls)
    found = random_vectors(model, None, config)
    nats = evaluate(model, config=config.eval).nats
    assert {e["instrument"]: e["values"] for e in found} == {
        name: [[[pytest.approx(x), pytest.approx(2 * x)]]] for name, x in nats.items()
    }
    *again, event = random_vectors(model, cloze, config)
    assert [e["instrument"] for e in again] == list(nats)
    assert event["instrument"] == "cloze"
    mean = read_cloze(model, cloze).mean()
    assert event["values"] == [[[pytest.approx(mean), pytest.approx(2 * mean)]]]
    assert [name for _, name, _ in asked] == ["vignettes", "vignettes", "cloze"]
    assert {count for *_, count in asked} == {config.eval.nulls}
    assert [e["layers"] for e in (*found, event)] == [sorted(asked[0][0])] * 8


def test_a_run_with_a_cloze_has_random_vectors_for_the_vignettes_too(tmp_path):
    config = RunConfig(model="tiny", axis="love", loop=small_loop(), out=tmp_path / "run")
    with tiny_runs():
        study(config, Console(file=StringIO()), until="vector")
    _, events, _ = read(tmp_path / "run")
    found = [e for e in events if e["event"] == "nulls"]
    assert [e["instrument"] for e in found] == [*FOUNDATIONS, "cloze"]
    assert {np.shape(e["values"]) for e in found} == {(1, 2, 2)}


def test_a_stage_that_no_vector_steers_says_nothing_about_the_cloze():
    """The prompted persona as teacher, at dose 0, moves it by less than the random vectors' 6."""
    found = with_nulls(record(shifts=GOOD, ratios=BROKEN), 4.0, [1.0, -3.0])
    for e in found[0]:
        if e["event"] == "stage" and e["stage"] == "steered":
            e["dose"] = 0.0
    assert Measurements(*found, AXIS, CONFIG).reads_cloze


def test_retention_in_the_table_is_that_over_all_sources():
    one = {"teacher": [4.0], "both": [2.0], "student": [1.0], "share": 0.5, "cosine": 1.0}
    other = {"teacher": [5.0], "both": [1.0], "student": [8.0], "share": 0.2, "cosine": 0.16}
    epoch = {"d": 0.5, "tokens_over": 0.1, "lam": 1.0}
    healing = {"event": "healing", "round": 0, "epochs": [epoch]}
    line = {"event": "retention", "round": 0, "sources": {"training": one, "answers": other}}
    [row] = rows([healing, stage_line("healed", 0), line])
    # 3 of 9, and 3 over the root of 9 times 9.
    assert (row["beta"], row["rho"]) == ("0.33", "0.33")
