"""Agreement of two instruments, on constructed records and on arrays."""

import numpy as np
import pytest
from helpers import one_sentence
from records import on, run, scores

from experiments.questions.agreement import agree
from experiments.questions.answers import answer_all
from shl.config import EvalConfig
from shl.measure.vignettes import vignettes
from shl.method.axes import load_axis
from shl.utils.errors import ShlError

AXIS = load_axis("care_auth")


def agreement(record, confidence=0.95):
    config = EvalConfig(bootstrap=100, confidence=confidence)
    return next((a for a in answer_all(*record, AXIS, config) if a.key == "agreement"), None)


def seconded(*shifts, hit=0.4):
    """A run whose stages a second instrument, digit style, has measured, with on-axis shifts of
    its own for the healed stages; the personas move both as the axis expects."""
    events, found = run(plus=on(0.4), minus=on(-0.4))
    prompted = {"base": None, "prompted+": on(0.4), "prompted-": on(-0.4)}
    lines = []
    for e in events:
        lines.append(e)
        if e["event"] == "stage" and e["stage"] != "steered":
            shift = on(shifts[e["round"]]) if e["stage"] == "healed" else prompted[e["stage"]]
            line = {"event": "reading", "instrument": "second", "log_probs": scores(shift, hit=hit)}
            labels = [v.foundation for v in vignettes()]
            lines.append(line | {"stage": e["stage"], "round": e["round"], "labels": labels})
    return lines, found


def test_valid_instruments_that_measure_the_same_shifts_agree():
    same = agreement(seconded(0.3, 0.4))
    # Care and authority have the largest shifts of either sign in both; the halves differ.
    found = same.figures["second"]
    assert found["spearman"] > 0.6
    assert found["interval"][0] > 0
    # Two healed and two prompted stages of 7 foundations.
    assert found["shifts"] == 28
    assert same.sentence.startswith(f"Second: Spearman {found['spearman']:.2f} (95 % +")
    opposed = agreement(seconded(-0.4, -0.5)).figures["second"]
    assert opposed["spearman"] < found["spearman"] - 0.3


def test_the_interval_is_that_of_the_settings_and_says_so():
    wide, narrow = (agreement(seconded(0.3, 0.4), c) for c in (0.95, 0.8))
    assert "(80 % " in narrow.sentence
    a, b = (x.figures["second"]["interval"] for x in (wide, narrow))
    assert b[1] - b[0] < a[1] - a[0]


def test_agreement_with_an_instrument_at_chance_is_not_claimed():
    # One in seven is chance: it chooses no foundation.
    found = agreement(seconded(0.3, 0.4, hit=1 / 7))
    assert "no agreement is claimed; second is not valid here" in found.sentence
    assert list(found.figures["second"]) == ["reason"]


def test_agreement_takes_two_instruments_and_waits_for_stages():
    events, found = seconded(0.3, 0.4)
    assert agreement(([e for e in events if e["event"] != "reading"], found)) is None
    begun = agreement((events[:2], found)).sentence
    assert begun == "Second: no stage beside base has been measured by both yet."


def test_items_without_an_answer_are_left_out():
    events, found = seconded(0.3, 0.4)
    (line,) = [e for e in events if e["event"] == "reading" and e["stage"] == "prompted+"]
    line["log_probs"][3][0][2] = None
    assert agreement((events, found)).figures["second"]["spearman"] > 0.6


def test_arrays_that_do_not_belong_together_are_refused():
    x = np.zeros((8, 7))
    for one, other, message in (([x, x], [x], "1 and 0 stages"), ([x[:3]], [x], "3 items")):
        with pytest.raises(ShlError) as error:
            agree(one, other)
        assert message in one_sentence(error)
