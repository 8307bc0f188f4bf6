"""The answers on constructed records whose verdict follows from arithmetic."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest
from records import GOOD_PROBES, healing, on, run, scores, stage, texts

from experiments.questions import thresholds
from experiments.questions.answers import answer_all, as_json
from shl.config import FOUNDATIONS, EvalConfig
from shl.measure.stats import bootstrap
from shl.method.axes import Axis, load_axis
from shl.utils.errors import ShlError

AXIS = load_axis("care_auth")  # care up, authority down
FEW = EvalConfig(bootstrap=10)
KEYS = ["Q0", "Q1", "Q2", "Q3", "prompting", "selective"]
REST = ["readable", "barrier", "dose", "moved", "ended", "worked"]


def ask(record, axis=AXIS):
    """Answers by key; whatever they are, they are JSON and end in one full stop."""
    found = answer_all(*record, axis, FEW)
    assert [a.key for a in found] == KEYS + REST
    json.dumps(as_json(found), allow_nan=False)
    for a in found:
        assert a.sentence.endswith(".")
        assert not a.sentence.endswith("..")
        assert not a.sentence[0].islower()
        if a.verdict != "info":
            assert a.sentence.lower().startswith(a.verdict)
        if a.deciding is not None:
            assert a.deciding.outcome == a.verdict
            assert a.key == "worked" or str(a.deciding)[1:] in a.sentence
            assert as_json(found)[a.key]["deciding"] == a.deciding.as_json()
        if a.key in KEYS and a.verdict != "info":
            assert [e.as_json() for e in a.estimates] == a.figures["decided"]
            assert a.deciding is not None
    return {a.key: a for a in found}


def verdicts(record, axis=AXIS):
    return {key: a.verdict for key, a in ask(record, axis).items()}


def figure(answer, what, index=None):
    (found,) = [
        f for f in answer.figures["decided"] if what in f["what"] and f["round"] in (index, None)
    ]
    return found


def test_working_run_is_yes_throughout_with_figures_by_hand():
    found = ask(run())
    for key in (*KEYS, "readable", "barrier", "worked"):
        assert found[key].verdict == "yes", found[key].sentence
    # Healed 0.3 less half of steered 0.5; every vignette moves alike, so nothing is left to chance.
    kept = figure(found["Q1"], "healed on-axis shift less 0.5 x steered")
    assert [kept[k] for k in ("value", "low", "high")] == pytest.approx([0.05] * 3)
    assert "round 0 60% (60% to 60%)" in found["Q1"].sentence
    assert "round 1 80%" in found["Q1"].sentence  # 0.4 / 0.5
    # A mass of 0.5 is 0.4 short of 0.9.
    assert found["Q1"].figures["broken"]["value"] == pytest.approx(0.4)
    assert "he steered stage is less coherent than base: " in found["Q1"].sentence
    gained = [figure(found["Q3"], "gained", k)["value"] for k in (0, 1)]
    assert gained == pytest.approx([0.3, 0.1])
    # Least squares through 0, 0.3, 0.4 at 0, 1, 2: (0.4 - 0) / 2.
    assert figure(found["Q3"], "trend")["value"] == pytest.approx(0.2)
    assert figure(found["Q3"], "cosine", 1)["value"] == pytest.approx(0.85)
    assert figure(found["prompting"], "on-axis", 1)["value"] == pytest.approx(0.3)  # 0.4 - 0.1
    assert "0.30 8/8 8.35, 0.75 7/8 15.35, 1.50 1/8 40.35" in found["Q0"].sentence  # + 0.35 midway
    assert found["Q0"].thresholds["FALLS"] == thresholds.FALLS
    assert found["Q2"].figures["perplexity"] == {"base": 9.0, "healed": [9.0, 9.0]}
    assert found["worked"].sentence == f"Yes. Yes: {', '.join(KEYS)}."
    # All hold. Only survival has an interval, of which 160 of 160 less 160 of 160 is 0, with
    # z^2 / (160 + z^2) below it: 0.2 (160 + z^2) / z^2 = 8.5 halves above the threshold.
    for key, name in (("Q1", "healed survival less base's"), ("Q2", "survival less base's")):
        assert found[key].deciding.what == name
        assert found[key].deciding.margin == pytest.approx(0.2 * (160 + 3.8415) / 3.8415, rel=1e-3)
    # In Q0 15 of 16 less 1 of 8 is 0.8125, 0.71 from the threshold with 0.41 below it: 1.7.
    assert found["worked"].deciding.what.startswith("Q0: fall of survival from doses up to half")
    assert len(found["worked"].estimates) == len(KEYS)


WIDE = scores(on(0.3), wobble=0.55)
"""Shifts of 0.85 and -0.25 by turns: factors of e^0.3 times 1.73 and 0.58, whose deviation is half
their mean. Weights p (12 of 0.4, 72 of 0.1) are worth 12^2 / 2.64 = 55 equal vignettes, so 0.3 is
known to 0.5 / sqrt(55) = 0.07, and its interval reaches 0.13 to both sides."""
CASES = {
    # survival falls by nothing, and by more than the 0.1 that is asked for, but not surely
    "Q0 no": (run(ladder=((0.3, 1, 8.0), (1.5, 8, 40.0))), "no"),
    "Q0 falls?": (run(ladder=((0.3, 8, 8.0), (1.5, 6, 40.0))), "undecided"),
    "Q0 perplexity falls": (run(ladder=((0.3, 8, 40.0), (1.5, 1, 8.0))), "no"),
    "Q0 off-trait": (run(steered=scores(on(-0.5), mass=0.5)), "no"),
    "Q0 negative alpha": (run(ladder=tuple((-d, k, x) for d, k, x in GOOD_PROBES)), "yes"),
    # 0.2 of 0.5 are kept; less than half of it
    "Q1 keeps little": (run(healed=(on(0.2), on(0.4))), "no"),
    "Q1 not coherent": (run(mass=0.9), "no"),
    "Q1 nothing to heal": (run(steered=scores(on(0.5))), "yes"),
    "Q1 wrong way": (run(steered=scores(on(-0.5), mass=0.5)), "no"),
    # 0.26 less 0.25, known to 0.13
    "Q1 keeps half?": (run(healed=(scores(on(0.26), wobble=0.55), on(0.4))), "undecided"),
    "Q2 mass": (run(mass=0.85), "no"),
    # masses of 1.6 and 0.4 by turns: the standard error of their mean is 0.6 / sqrt(84) = 0.065
    "Q2 mass?": (run(mass_wobble=0.6), "undecided"),
    "Q2 survival": (run(kept=110, base_kept=160), "no"),  # 0.31 fewer, at least 0.24
    # 12 of 16 less 16 of 16 is -0.25; Newcombe's limits -0.50 and -0.01 lie to both sides of -0.20
    "Q2 survival?": (run(kept=12, base_kept=16, total=16), "undecided"),
    # 8 of 16: Wilson 0.28 to 0.72, so -0.5 + sqrt(0.22^2 + 0.194^2) = -0.207 is below -0.20
    "Q2 half survives": (run(kept=8, base_kept=16, total=16), "no"),
    # 4 of 4: Wilson's 4 / (4 + 3.84) = 0.51 does not rule out a collapse below 2/3
    "Q2 few samples": (run(kept=4, total=4), "undecided"),
    "Q2 base without survivors": (run(base_kept=0), "undecided"),
    "Q3 collapse?": (run(kept=4, total=4), "undecided"),
    "Q3 one collapsed round": (run(healed=(scores(on(0.3), mass=0.6), on(0.4))), "no"),
    "Q3 falls back": (run(healed=(on(0.4), on(0.3))), "no"),
    "Q3 grows?": (run(healed=(on(0.3), WIDE)), "undecided"),
    "Q3 turns": (run(cosines=({"6": 1.0}, {"6": -0.1, "7": -0.2})), "no"),
    "Q3 turns in part": (run(cosines=({"6": 1.0}, {"6": 0.5, "7": -0.2})), "undecided"),
    "Q3 one round": (run(healed=(on(0.3),)), "undecided"),
    # 0.5 by prompting, 0.4 by healing; a mass of 0.85 is out of comparison with one of 1
    "prompting is better": (run(plus=on(0.5)), "no"),
    "prompting unmatched": (run(mass=0.85), "no"),
    "prompting unmatched?": (run(kept=12, base_kept=16, total=16), "undecided"),
    "prompting alike?": (run(healed=(scores(on(0.1), wobble=0.55),)), "undecided"),
    # prompted -0.1 and -0.7: half the contrast is 0.3, healed only 0.2 and 0.25
    "prompting half contrast": (
        run(plus=on(-0.1), minus=on(-0.7), healed=(on(0.2), on(0.25))),
        "no",
    ),
    # prompted -0.3 and -0.1, half the contrast -0.1: no shift at all is the rival of -0.05
    "prompting no shift": (run(plus=on(-0.3), minus=on(-0.1), healed=(on(-0.05),)), "no"),
    # the prompted mass of 2 counts as base's 1
    "prompting primed": (run(plus=scores(on(0.1), mass=2.0)), "yes"),
    # off-axis: liberty by -0.6 against 0.4
    "selective no": (run(healed=(on(0.3) | {"liberty": -0.6},)), "no"),
    # liberty by -0.42 + log cosh 0.5 = -0.3, against 0.3
    "selective?": (run(healed=(scores(on(0.3) | {"liberty": -0.42}, wobble=0.5),)), "undecided"),
    "barrier off": (run(barrier="off"), "no"),
    "barrier never": (run(barrier="never fired"), "no"),
    "worked no": (run(mass=0.9), "no"),
    "worked?": (run(kept=4, total=4), "undecided"),
}


@pytest.mark.parametrize("name", CASES)
def test_each_verdict(name):
    record, expected = CASES[name]
    found = ask(record)[key_of(name)]
    assert found.verdict == expected, found.sentence


def key_of(name):
    return name.rstrip("?").split()[0]


def test_each_verdict_is_reached_for_every_claim():
    reached = {(key_of(name), expected) for name, (_, expected) in CASES.items()}
    assert {(key, v) for key in KEYS for v in ("no", "undecided")} <= reached


def test_a_sentence_has_the_verdict_the_deciding_estimate_and_the_rest():
    no = ask(run(healed=(on(0.2), on(0.4))))
    # 0.2 less half of 0.5
    assert no["Q1"].sentence.startswith(
        "No. Healed on-axis shift less 0.5 x steered -0.050 nats (-0.050 to -0.050), must be above "
        "0. Holds: healed valid-answer mass over base's; "
    )
    assert no["worked"].sentence.startswith("No. First no: Q1, does the student keep the shift. ")
    few = ask(run(kept=12, base_kept=16, total=16))["Q2"].sentence
    assert few.startswith("Undecided. Survival less base's (round 0) -0.25 (")
    assert (
        "12 of 16, base 16 of 16), must be above -0.20. Open: survival less base's (round 1)" in few
    )


def test_an_ideal_run_at_the_default_sizes_answers_every_question_with_yes():
    """64 samples a stage, base included, 84 vignettes, 3 rounds, 5 rungs of 8 probes; a tenth of
    the default resamples, for time."""
    ladder = tuple((0.3 * k, 8 if k < 3 else 1, 8.0 * k) for k in range(1, 6))
    found = answer_all(
        *run(
            healed=(on(0.3), on(0.4), on(0.5)),
            cosines=({"6": 1.0}, {"6": 0.9}, {"6": 0.8}),
            kept=EvalConfig().samples,
            total=EvalConfig().samples,
            ladder=ladder,
        ),
        AXIS,
        EvalConfig(bootstrap=EvalConfig().bootstrap // 10),
    )
    by_key = {a.key: a for a in found}
    for key in (*KEYS, "readable", "barrier", "worked"):
        assert by_key[key].verdict == "yes", by_key[key].sentence
    # 64 of 64 against 64 of 64: 1 - 64 / (64 + 1.96^2) below 0.
    survival = figure(by_key["Q2"], "survival less base's", 2)
    assert survival["low"] == pytest.approx(-(1.959964**2) / (64 + 1.959964**2), abs=1e-6)
    assert survival["needs"] == -by_key["Q2"].thresholds["SURVIVAL_LOSS"] == -0.2


def test_an_answer_takes_ten_times_the_resamples_of_a_stage(monkeypatch):
    counts = []

    def counted(*args, resamples, **settings):
        counts.append(resamples)
        return bootstrap(*args, resamples=resamples, **settings)

    for module in ("measurements", "filtering"):
        monkeypatch.setattr(f"experiments.questions.{module}.bootstrap", counted)
    ask(run())
    assert len(counts) > 10
    assert set(counts) == {10 * FEW.bootstrap}


@pytest.mark.parametrize(
    ("kept", "outcome"),
    # 52 of 64 in base. Wilson limits of 0.8125 are 0.7005 and 0.8892, the same texts survive, so
    # that their correlation is 1: 0 - |0.1120 - 0.0767| = -0.0353. 39 of 64 are 0.203 fewer, 19 of
    # 64 0.516 fewer, without correlation at least 0.516 - sqrt(0.120^2 + 0.112^2) = 0.352.
    [(52, "yes"), (39, "undecided"), (19, "no")],
)
def test_survival_may_be_a_fifth_lower_than_that_of_base(kept, outcome):
    survival = figure(ask(run(kept=kept, base_kept=52, total=64))["Q2"], "survival less base's", 0)
    assert (survival["needs"], survival["verdict"]) == (-0.2, outcome)
    if kept == 52:
        assert survival["low"] == pytest.approx(-0.0353, abs=2e-4)


@pytest.mark.parametrize(
    "how",
    [{"mass": 0.6}, {"kept": 80, "base_kept": 160}],  # 0.6 and 0.5 of base, below 2/3
    ids=["mass", "survival"],
)
def test_collapsed_run_is_no_whatever_its_shift(how):
    found = ask(run(healed=(on(0.4), on(0.6)), **how))
    assert found["Q2"].figures["collapsed"] == "yes"
    assert "Collapsed (below 0.67 of base's)" in found["Q2"].sentence
    for key in ("Q2", "Q3", "prompting", "selective", "worked"):
        assert found[key].verdict == "no", key
    # Q3's other estimates all hold.
    others = [f for f in found["Q3"].figures["decided"] if "collapse" not in f["what"]]
    assert {f["verdict"] for f in others} == {"yes"}
    assert found["Q3"].sentence.startswith("No. No collapse: ")


def test_only_a_coherent_round_can_beat_prompting():
    # Round 0 is ahead at 0.8 of the mass, round 1 is behind at all of it.
    record = run(healed=(scores(on(0.4), mass=0.8), on(0.05)))
    found = ask(record)["prompting"]
    assert found.verdict == "no"
    assert found.figures["rounds"] == ["no", "no"]
    assert "is as coherent as" not in found.sentence
    assert "no healed round is as coherent" in ask(run(mass=0.85))["prompting"].sentence.lower()
    record = run(healed=(on(0.4), scores(on(0.4), mass=0.8)))
    found = ask(record)["prompting"]
    assert found.verdict == "yes"
    assert "Ahead in round 0." in found.sentence
    # As coherent as a persona that has collapsed is collapsed all the same.
    record = run(plus=scores(on(0.1), mass=0.5), mass=0.6)
    found = ask(record)["prompting"]
    assert found.figures["rounds"] == ["yes", "yes"]
    assert found.verdict == "no"


def test_interval_widens_with_the_number_of_rounds_compared():
    # 1 - 0.05 / 4 against 1 - 0.05: 2.50 standard errors against 1.96.
    config = EvalConfig(bootstrap=50)
    spans = []
    for count in (1, 4):
        record = run(healed=(WIDE,) * count, cosines=({"6": 1.0},) * count)
        answers = answer_all(*record, AXIS, config)[4]
        assert answers.key == "prompting"
        lead = figure(answers, "on-axis", 0)
        spans.append(lead["high"] - lead["low"])
    assert 1.1 < spans[1] / spans[0] < 1.5


def validity(valid, instrument="vignettes"):
    answers = {"event": "validity", "round": -1, "instrument": instrument}
    return answers | {"valid": valid, "reason": "the stems disagree."}


def test_answers_from_invalid_vignettes_are_undecided():
    events, found = run(healed=(on(0.2), on(0.1)))  # Q1 and Q3 would be a no
    answers = ask(([validity(False), *events], found))
    for key in ("Q0", "Q1", "Q3", "prompting", "selective", "worked"):
        assert answers[key].verdict == "undecided", key
    for key in ("Q0", "Q1", "Q3", "prompting", "selective", "readable"):
        assert "he vignettes are not valid on this model" in answers[key].sentence
    assert answers["readable"].verdict == "no"
    assert "not valid on this model: the stems disagree." in answers["readable"].sentence
    # Coherence is not the trait's reading, and its no stands.
    assert answers["Q2"].verdict == "yes"
    events, found = run(mass=0.6)
    answers = verdicts(([validity(False), *events], found))
    assert (answers["Q2"], answers["Q3"], answers["worked"]) == ("no", "no", "no")
    for event in (validity(True), validity(False, "tinymfv")):
        events, found = run()
        assert verdicts(([event, *events], found))["worked"] == "yes"


def test_vignettes_at_chance_make_answers_undecided():
    # The intended option gets 0.05, the others more: none is named. Readings must then be open.
    found = ask(run(base=scores(hit=0.05)))
    assert found["readable"].verdict == "no"
    assert found["Q3"].verdict == "undecided"
    assert "above chance" in found["Q3"].sentence
    assert figure(found["readable"], "share of vignettes")["value"] == 0.0
    # Six in seven are named, which beats chance; none of the 12 of care, which leaves it open.
    p = np.array(scores())
    care = np.arange(84) % 7 == 0
    p[care] = np.array(scores(hit=0.05))[care]
    found = ask(run(base=p.tolist(), healed=(p.tolist(),)))
    assert found["readable"].verdict == "undecided"
    assert figure(found["readable"], "share of care vignettes")["value"] == 0.0
    assert "Not readable (at most twice chance): care." in found["readable"].sentence


def test_unfinished_run_is_answered_as_far_as_it_goes():
    events, found = run()
    for count in range(len(events) + 1):
        answers = ask((events[:count], found))
        if count < len(events):
            assert answers["worked"].verdict != "yes"
            assert "Not yet, " in answers["ended"].sentence
            assert "allows no yes" in answers["worked"].sentence
    nothing = ask(([], []))
    assert {a.verdict for a in nothing.values()} == {"undecided", "info"}
    assert "no round was finished" in nothing["Q2"].sentence
    assert "nothing was healed" in nothing["barrier"].sentence.lower()
    # Q0 needs no healed stage: base, prompted+-, steered.
    assert verdicts((events[:4], found))["Q0"] == "yes"


def test_what_is_missing_is_named():
    found = ask(run(base_kept=0))["Q2"]
    assert "none of 160 samples of base survive" in found.sentence
    events, recorded = run()
    baselines = [e for e in events if e["round"] < 0]
    early = ask((baselines, recorded))
    for key in ("Q1", "Q2", "Q3", "prompting"):
        assert [e.what for e in early[key].estimates] == ["healed stage"]


def test_missing_dose_walk_and_missing_perplexities():
    found = ask(run(ladder=()))["Q0"]
    assert found.verdict == "undecided"
    assert "the walk was off" in found.sentence
    # Empty completions are the worst: they rank above every finite perplexity.
    record = run(ladder=((0.3, 8, 8.0), (1.5, 0, None)))
    answers = ask(record)["Q0"]
    assert answers.verdict == "yes"
    assert answers.figures["ladder"][1]["perplexity"] is None
    assert "1.50 0/8 unknown" in answers.sentence
    events, all_texts = run()
    blank = [t | {"perplexity": None} for t in all_texts]
    assert ask((events, blank))["Q2"].figures["perplexity"]["base"] is None
    assert ask((events, []))["Q2"].verdict == "undecided"


def an_axis(expected):
    return Axis("test", "", "Up.", "Down.", ("c",), ("p",), expected)


def test_axes_with_one_foundation_or_all():
    one = ask(
        run(healed=({"care": 0.3}, {"care": 0.4}), plus={"care": 0.1}, minus={"care": -0.1}),
        an_axis({"care": 1}),
    )
    # Care alone: the steered stage's care is +0.5, of which 0.3 are kept.
    assert {one[key].verdict for key in KEYS} == {"yes"}
    assert figure(one["Q3"], "gained", 0)["value"] == pytest.approx(0.3)
    every = ask(run(), an_axis(dict.fromkeys(FOUNDATIONS, 1)))
    assert every["selective"].verdict == "info"
    assert "expects every foundation" in every["selective"].sentence
    assert "selective" not in every["worked"].sentence


def test_the_barriers_tokens_are_named_with_their_kl():
    events, found = run(healed=(on(0.3),))
    curves = [
        {"verdict": "kept", "pieces": ["a", " b"], "kl": [0.5, 0.1]},  # at tau is not above it
        {"verdict": "dropped", "pieces": [" x", "\n", " x"], "kl": [0.75, 4.0, 2.0]},
    ]
    events += [{"event": "token_kl", "round": 0, "curves": curves}]
    answers = ask((events, found))["barrier"]
    assert "Kept text on record: 0 of 2 tokens above tau." in answers.sentence
    assert (
        r"Dropped text on record: 3 of 3 tokens above tau, highest '\n' 4.00, ' x' 2.00 x2 nats."
        in answers.sentence
    )
    # Of two steps one fired.
    assert "Round 0: bound (fired in 1 of 2 steps, last epoch D 0.48" in answers.sentence
    assert answers.figures["texts"][1]["tokens"][0] == {"piece": "\n", "count": 1, "kl": 4.0}
    # Curves of a round that has not been healed have no tau to lie above.
    answers = ask(([*events[:-1], events[-1] | {"round": 7}], found))["barrier"]
    assert answers.figures["texts"] == []


def test_lowest_dose_unmoved_adapters_and_an_early_end():
    events, found = run(end=False)
    events = [e if e["event"] != "healing" else healing(e["round"], moved=False) for e in events]
    events.append({"event": "starved", "round": 2, "sentence": "round 2: 3 completions survived."})
    answers = ask((events, found))
    assert answers["moved"].sentence == "The adapter did not move in round 0, 1."
    assert answers["ended"].sentence == "Stopped early, round 2: 3 completions survived."
    first, second = answers["dose"].sentence.split("; ")
    assert first == "Round 0: kappa 0.50, 6 of 9 completions kept"
    assert second == "round 1: kappa 0.50 (the lowest), 6 of 9 completions kept."
    online = [e | {"kept": 0} if e["event"] == "round" else e for e in events]
    assert ask((online, found))["dose"].sentence.startswith("Round 0: kappa 0.50, on-policy; ")
    done = ask(run())
    assert done["moved"].sentence == "Every adapter moved."
    assert done["ended"].sentence == "2 rounds, all done."


def test_the_same_record_gives_the_same_answers_and_confidence_widens_them():
    record = run(mass_wobble=0.3)
    assert answer_all(*record, AXIS, FEW) == answer_all(*record, AXIS, FEW)
    spans = []
    for confidence in (0.5, 0.95):
        config = EvalConfig(bootstrap=10, confidence=confidence)
        mass = answer_all(*record, AXIS, config)[2].figures["decided"][0]
        spans.append(mass["high"] - mass["low"])
    assert spans[0] < 0.6 * spans[1]  # 0.67 against 1.96 standard errors


def test_masses_are_paired_by_vignette():
    # Base's own mass swings by 1 +- 0.5, and the healed stage's with it: their ratio is 1 exactly.
    swinging = scores(mass_wobble=0.5)
    found = ask(run(base=swinging, healed=(swinging,)))["Q2"]
    mass = figure(found, "valid-answer mass", 0)
    assert (mass["low"], mass["high"]) == pytest.approx((1.0, 1.0))


def test_malformed_scores_and_settings_are_rejected():
    events, found = run()
    for changed in (events[0]["log_probs"][:5], [[[1.0] * 7]] * 84, [[[0.0] * 6]] * 84):
        with pytest.raises(ShlError):
            answer_all([stage("base", -1, changed), *events[1:]], found, AXIS, FEW)
    with pytest.raises(ShlError, match="the labels name"):
        answer_all([events[0] | {"labels": ["cares"] * 84}, *events[1:]], found, AXIS, FEW)


def test_labels_come_from_the_record():
    # Only the 72 that are not of care: base names all of them, and there are none of care.
    events, found = run()
    left = [i for i, label in enumerate(events[0]["labels"]) if label != "care"]
    for event in events:
        for key in ("labels", "log_probs"):
            if key in event:
                event[key] = [event[key][i] for i in left]
    answers = ask((events, found))["readable"]
    assert figure(answers, "share of vignettes")["value"] == 1.0
    assert answers.verdict == "undecided"
    assert "Share of care vignettes: there are none" in answers.sentence


def test_every_threshold_has_its_reason_and_is_used():
    tree = ast.parse(Path(thresholds.__file__).read_text("utf-8")).body
    names = [node.targets[0].id for node in tree if isinstance(node, ast.Assign)]
    reasons = [node for node in tree[1:] if isinstance(node, ast.Expr)]
    assert len(names) == len(reasons)
    used = {name: v for a in answer_all(*run(), AXIS, FEW) for name, v in a.thresholds.items()}
    assert used == {name: getattr(thresholds, name) for name in names}


def test_texts_of_a_steered_stage_are_those_at_its_dose():
    # 8 probes at 0.75 of which 7 are kept, and a batch at 0.75 of which 1 of 32 is.
    events, found = run(steered=scores(on(0.5)))
    found += [t | {"stage": "batch"} for t in texts("batch", 0, 1, 32, dose=0.75)]
    found += texts("batch", 0, 32, 32, dose=0.3)
    # Its mass is base's, so only survival says that there is something to heal: 8 of 40.
    broken = ask((events, found))["Q1"].figures["broken"]
    assert broken["note"] == "8 of 40, base 160 of 160"
    assert broken["value"] == pytest.approx(1 - 8 / 40)
    assert broken["verdict"] == "yes"


def test_the_gain_of_a_round_is_over_the_round_before():
    cosines = ({"6": 1.0}, {"6": 0.9}, {"6": 0.8})
    found = ask(run(healed=(on(0.3), on(0.5), on(0.4)), cosines=cosines))["Q3"]
    gains = [figure(found, "on-axis shift gained", index)["value"] for index in range(3)]
    assert gains == pytest.approx([0.3, 0.2, -0.1])
    assert found.verdict == "no"
