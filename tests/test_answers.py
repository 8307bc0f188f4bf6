"""The four answers on constructed events whose yes or no is known, and what a record refuses."""

import pytest

from experiments.diary import diary
from experiments.summary import answers, on_axis, rows, stages
from shl.axes import load_axis
from shl.config import FOUNDATIONS

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
            {
                "event": "healing",
                "round": index,
                "barrier": "bound",
                "moved": True,
                "tau": 0.5,
                "epochs": [epoch],
            }
        )
        short = {"kappa": 0.2, "kept": 6, "generated": 9, "at_floor": index == 1}
        short["cosine_to_first"] = {"6": 1.0 if index == 0 else cosine}
        events.append({"event": "round", "round": index, **short})
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


def test_the_diary_fences_backticks():
    evil = "one\n```\n# not a heading\n````\ntwo"

    def line(stage, index, text, dose=0.0):
        told = {"prompt": "Why?", "text": text, "dose": dose, "reasons": []}
        return told | {"stage": stage, "round": index}

    lines = [line("base", -1, "plain"), line("batch", 0, evil, 1.5), line("healed", 0, "by day")]
    text = diary(lines, 1)
    fenced = text.split("`````text\n")
    assert len(fenced) == 2  # five, one more than the four inside
    assert fenced[1].startswith(f"{evil}\n`````\n")
    assert "```text\nplain\n```" in text
    assert "**dreamt** (dose 1.50, kept)" in text


def test_a_wrong_way_shift_does_not_heal():
    events = run(first=(-2.5, -1.5))  # healed -0.5 on the axis
    events[3] = stage("steered", 0, -3.0, -1.0, coherence=0.5, survival=0.5)  # steered -1.0
    assert verdicts(events)["Q1"] == "no"


def test_a_negative_alpha_is_ordered_by_size():
    assert verdicts(run(), probes((-0.3, 4, 8.0), (-1.5, 1, 40.0)))["Q0"] == "yes"


def test_a_dose_at_its_floor_and_an_adapter_that_did_not_move_are_said():
    events = run()
    found = answers(events, [], AXIS)
    first, second = found["the dose"].split("; ")
    assert first == "round 0: kappa 0.20, 6 of 9 completions kept"
    assert "(the floor: no lower dose was left to step down to)" in second
    assert "did not move" not in found["the barrier"]
    still = [e | {"moved": False, "barrier": "never fired"} if "moved" in e else e for e in events]
    assert "never fired" in answers(still, [], AXIS)["the barrier"]
    assert "the adapter did not move" in answers(still, [], AXIS)["the barrier"]


def test_a_run_that_starved_says_so_with_what_it_has():
    ended = {"event": "starved", "round": 2, "sentence": "round 2: 3 completions survived."}
    found = answers([*run(), ended], [], AXIS)
    assert found["stopped early"] == "round 2: 3 completions survived."
    assert "Q0 can we filter?" in found
    assert "stopped early" in answers([ended], [], AXIS)
