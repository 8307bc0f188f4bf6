"""The four answers on constructed events whose yes or no is known, and what a record refuses."""

import pytest
from helpers import one_sentence

from experiments.diary import diary
from experiments.folder import read
from experiments.record import Record
from experiments.summary import answers, on_axis, rows, stages
from shl.axes import load_axis
from shl.config import FOUNDATIONS
from shl.errors import ShlError
from shl.filters import Verdict
from shl.generate import Completion
from shl.tokens import Prompt

AXIS = load_axis("care_auth")  # care up, authority down


def stage(name, index, care, authority, *, coherence=1.0, survival=1.0):
    nats = dict.fromkeys(FOUNDATIONS, -2.0) | {"care": care, "authority": authority}
    shift = {key: value + 2.0 for key, value in nats.items()}
    return {
        "event": "stage",
        "stage": name,
        "round": index,
        "nats": nats,
        "coherence": coherence,
        "survival": survival,
        "perplexity": 9.0,
        "accuracy": 0.61,
        "noise": [],
        "shift": shift,
        "shift_interval": {key: (value - 0.1, value + 0.1) for key, value in shift.items()},
    }


def run(*, last=(-1.2, -3.4), coherence=1.0, cosine=0.9, first=(-1.5, -3.0)):
    """Base at -2; steered +1.0 / -2.0 at coherence 0.5; healed +0.5 / -1.0, then +0.8 / -1.4."""
    events = [
        stage("base", -1, -2.0, -2.0),
        stage("prompted+", -1, -1.8, -2.2),
        stage("prompted-", -1, -2.1, -1.9),
    ]
    for index, healed in enumerate((first, last)):
        events.append(stage("steered", index, -1.0, -4.0, coherence=0.5, survival=0.5))
        events.append(stage("healed", index, *healed, coherence=coherence))
        epoch = {"d": 0.48, "lam": 1.5, "tokens_over": 0.1}
        events.append(
            {"event": "healing", "round": index, "barrier": "bound", "tau": 0.5, "epochs": [epoch]}
        )
        cosines = {"6": 1.0 if index == 0 else cosine}
        events.append({"event": "round", "round": index, "cosine_to_first": cosines})
    return events


def probes(*groups):
    """(dose, kept of 4, perplexity) each."""
    return [
        {
            "stage": "probe",
            "round": 0,
            "dose": dose,
            "perplexity": perplexity,
            "reasons": [] if i < kept else ["soup"],
        }
        for dose, kept, perplexity in groups
        for i in range(4)
    ]


def test_a_foundation_that_base_cannot_read_is_marked_in_the_table_and_said():
    events = run()
    assert "care_nats" in rows(events[:3])[0]
    text = answers(events, GOOD, AXIS)["can we read it?"]
    assert text.startswith("names the intended foundation of 61% ")
    assert text.endswith("noise (at most twice chance): none.")
    events[0]["noise"] = ["care"]
    assert list(rows(events[:3])[0])[1:3] == ["care_nats (noise)", "auth_nats"]
    assert "care: do not read these" in answers(events, GOOD, AXIS)["can we read it?"]


GOOD = probes((0.3, 4, 8.0), (1.5, 1, 40.0))


def verdicts(events, texts=GOOD):
    found = answers(events, texts, AXIS)
    return {key.split()[0]: text.split(";")[0] for key, text in found.items()}


def test_a_run_that_works_gets_four_yes():
    found = verdicts(run())
    assert [found[q] for q in ("Q0", "Q1", "Q2", "Q3", "beyond")] == ["yes"] * 5
    text = answers(run(), GOOD, AXIS)
    # (0.5 + 1.0) / 2 of (1.0 + 2.0) / 2
    assert "on-axis shift +1.50 to +0.75 nats (50% kept)" in text["Q1 does healing heal?"]
    assert "0.30: 100% / 8.0, 1.50: 25% / 40.0" in text["Q0 can we filter?"]
    # (0.8 + 1.4) / 2
    assert "+0.75, +1.10 nats" in text["Q3 one direction?"]
    # (0.2 + 0.2) / 2, and (0.3 + 0.3) / 2 against the opposite
    assert "persona +0.20 (against its opposite +0.30)" in text["beyond prompting?"]
    assert text["the barrier"].startswith("round 0: bound (last epoch D 0.48 at tau 0.5, lam 1.5)")


def test_each_no_is_said():
    assert verdicts(run(), probes((0.3, 2, 8.0), (1.5, 2, 40.0)))["Q0"] == "no"  # survives alike
    assert verdicts(run(), probes((0.3, 4, 8.0), (1.5, 1, 9.0)))["Q0"] == "no"  # 9 < 1.2 * 8
    assert "walk was off" in verdicts(run(), [])["Q0"]
    # 0.06 of 1.5 nats are 4 % of the shift; and a healed stage below the steered coherence.
    assert verdicts(run(first=(-1.94, -2.06)))["Q1"] == "no"
    assert verdicts(run(coherence=0.4))["Q1"] == "no"
    assert verdicts(run(coherence=0.9))["Q2"] == "no"
    assert verdicts(run(last=(-1.6, -2.9)))["Q3"] == "no"  # +0.65 after +0.75
    assert verdicts(run(cosine=-0.1))["Q3"] == "no"
    assert verdicts(run(last=(-1.9, -2.1)))["beyond"] == "no"  # +0.1 against +0.2


def test_without_a_finished_round_nothing_is_answered():
    (only,) = answers(run()[:3], [], AXIS).values()
    assert "no round was finished" in only


def test_the_axis_decides_the_sign():
    base, healed = stages(run(), "base")[0], stages(run(), "healed")[1]
    # care +0.8 and authority -1.4, expected up and down
    assert on_axis(healed, base, AXIS) == pytest.approx(1.1)
    assert on_axis(base, healed, AXIS) == pytest.approx(-1.1)


def test_the_diary_fences_backticks(tmp_path):
    record = Record(tmp_path / "run", {}, "cpu")
    evil = "one\n```\n# not a heading\n````\ntwo"

    def verdict(text, dose=0.0):
        return Verdict(Completion(Prompt("Why?"), text, (5,), (2,), dose), (), 2.0, 2.0)

    record.texts("base", -1, [verdict("plain")])
    record.texts("batch", 0, [verdict(evil, 1.5)])
    record.texts("healed", 0, [verdict("by day")])
    text = diary(read(tmp_path / "run")[2], 1)
    fenced = text.split("`````text\n")
    assert len(fenced) == 2  # five, one more than the four inside
    assert fenced[1].startswith(f"{evil}\n`````\n")
    assert "```text\nplain\n```" in text
    assert "**dreamt** (dose 1.50, kept)" in text


def test_a_run_folder_that_is_not_empty_is_refused(tmp_path):
    Record(tmp_path / "new" / "deep", {}, "cpu")
    with pytest.raises(ShlError) as error:
        Record(tmp_path / "new", {}, "cpu")
    assert "is not empty" in one_sentence(error)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ShlError, match="cannot be written"):
        Record(tmp_path / "file", {}, "cpu")


def test_a_wrong_way_shift_does_not_heal():
    events = run(first=(-2.5, -1.5))  # healed -0.5 on the axis
    events[3] = stage("steered", 0, -3.0, -1.0, coherence=0.5, survival=0.5)  # steered -1.0
    assert verdicts(events)["Q1"] == "no"


def test_a_negative_alpha_is_ordered_by_size():
    assert verdicts(run(), probes((-0.3, 4, 8.0), (-1.5, 1, 40.0)))["Q0"] == "yes"
