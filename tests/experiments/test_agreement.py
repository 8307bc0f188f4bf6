"""Whether two instruments agree, on constructed records."""

from records import on, run, scores

from experiments.questions.answers import answer_all
from shl.config import EvalConfig
from shl.measure.vignettes import vignettes
from shl.method.axes import load_axis

AXIS = load_axis("care_auth")
FEW = EvalConfig(bootstrap=100)


def other(name, stage, index, log_probs):
    """A line of another instrument, digit style: what it scores is its log-probability."""
    told = {"event": "reading", "instrument": name, "stage": stage, "round": index}
    return told | {"log_probs": log_probs, "labels": [v.foundation for v in vignettes()]}


def seconded(*shifts, plus=0.4, hit=0.4):
    """A run whose stages a second instrument has read, with on-axis shifts of its own for the two
    healed stages; the personas move both instruments as the axis expects."""
    events, found = run(plus=on(plus), minus=on(-plus))
    more = {"base": None, "prompted+": on(plus), "prompted-": on(-plus)}
    lines = []
    for e in events:
        lines.append(e)
        if e["event"] == "stage" and e["stage"] != "steered":
            shift = on(shifts[e["round"]]) if e["stage"] == "healed" else more[e["stage"]]
            values = scores(shift, hit=hit)
            lines.append(other("second", e["stage"], e["round"], values))
    return lines, found


def test_two_valid_instruments_that_read_the_same_shifts_agree():
    answers = {a.key: a for a in answer_all(*seconded(0.3, 0.4), AXIS, FEW)}
    told = answers["agreement"]
    # Care and authority have the largest shifts of either sign in both; the halves differ.
    same = told.figures["second"]
    assert same["spearman"] > 0.6
    assert same["interval"][0] > 0
    assert told.sentence.startswith(f"second: Spearman {same['spearman']:.2f}")
    against = {a.key: a for a in answer_all(*seconded(-0.4, -0.5), AXIS, FEW)}
    assert against["agreement"].figures["second"]["spearman"] < same["spearman"] - 0.3


def test_agreement_with_an_instrument_that_knows_nothing_is_not_claimed():
    # One in seven is chance: it names no foundation.
    answers = {a.key: a for a in answer_all(*seconded(0.3, 0.4, hit=1 / 7), AXIS, FEW)}
    assert "no agreement is claimed; second is not valid here" in answers["agreement"].sentence
    assert list(answers["agreement"].figures["second"]) == ["reason"]


def test_agreement_is_not_asked_of_one_instrument_and_waits_for_stages():
    events, found = seconded(0.3, 0.4)
    alone = [e for e in events if e["event"] != "reading"]
    assert "agreement" not in {a.key for a in answer_all(alone, found, AXIS, FEW)}
    begun = {a.key: a for a in answer_all(events[:2], found, AXIS, FEW)}
    assert begun["agreement"].sentence == "second: no stage beside base has been read by both yet."


def test_items_without_an_answer_are_left_out_of_an_agreement():
    events, found = seconded(0.3, 0.4)
    (line,) = [e for e in events if e["event"] == "reading" and e["stage"] == "prompted+"]
    line["log_probs"][3][0][2] = None
    told = {a.key: a for a in answer_all(events, found, AXIS, FEW)}["agreement"]
    assert told.figures["second"]["spearman"] > 0.6
