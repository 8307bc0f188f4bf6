"""Whole continuations against full logits on single rows, and the crossed conflicts by hand."""

import numpy as np
import pytest
import torch
from helpers import tiny_llama

from shl.measure.continuations import (
    CELLS,
    Cloze,
    Conflict,
    ConflictItem,
    conflict_items,
    option_scores,
    read_cloze,
    read_conflict,
    read_context,
)
from shl.models.tiny import tiny_gemma
from shl.models.tokens import Prompt, encode, encode_text
from shl.utils.errors import ShlError

ITEM = ConflictItem(
    "The cook", "Mia", "The guest", ("fry it", "boil it"), ("fried it", "boiled it")
)
PREFIXES = [[2, 9, 7, 30], [2, 8], [2, 40, 41, 42, 43, 44]]
OPTIONS = [[[5], [6, 7, 8]], [[9, 10], [11]], [[5, 5, 5, 5], [12]]]


def by_hand(model, prefix, option):
    logits = model(torch.tensor([[*prefix, *option]]))[0].double().log_softmax(-1)
    return sum(float(logits[len(prefix) - 1 + i, token]) for i, token in enumerate(option))


@pytest.mark.parametrize("make", [tiny_gemma, tiny_llama])
@pytest.mark.parametrize(("batch_size", "group"), [(1, 1), (3, 1), (1, 2), (3, 2), (4, 2)])
def test_options_are_scored_whole(make, batch_size, group):
    model = make()
    # The rows of a group begin alike, and groups are not in the order of their lengths.
    prefixes = [row + end for row in PREFIXES for end in ([9], [3, 5])] if group == 2 else PREFIXES
    options = [row for row in OPTIONS for _ in range(group)]
    scores = option_scores(model, prefixes, options, batch_size=batch_size, group=group)
    expected = [
        [by_hand(model, prefix, option) for option in row]
        for prefix, row in zip(prefixes, options, strict=True)
    ]
    np.testing.assert_allclose(scores, expected, atol=2e-5)
    scores = option_scores(
        model, prefixes, options, batch_size=batch_size, group=group, relative=True
    )
    np.testing.assert_allclose(
        scores[:, 0] - scores[:, 1], np.subtract(*np.transpose(expected)), atol=2e-5
    )


def test_cloze_is_the_log_odds_of_the_words_of_either_pole():
    model = tiny_gemma()
    cloze = Cloze(("The day is", "We felt"), ("good", "warm"), ("bad", "cold"))
    expected = []
    for opening in cloze.openings:
        prefix = encode_text(model, opening, bos=True)
        p = {
            w: np.exp(by_hand(model, prefix, encode_text(model, f" {w}")))
            for w in ("good", "warm", "bad", "cold")
        }
        expected.append(np.log((p["good"] + p["warm"]) / (p["bad"] + p["cold"])))
    np.testing.assert_allclose(read_cloze(model, cloze), expected, atol=5e-5)


def test_a_chat_model_reads_an_opening_as_the_beginning_of_its_answer():
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}>"
    model = tiny_gemma(chat_template=template)
    cloze = Cloze(("The day was", "She felt"), ("warm",), ("cold",))
    plus, minus = (encode_text(model, f" {word}") for word in ("warm", "cold"))
    for persona, said in ((None, "[Tell me something.]>"), ("Be kind.", "[Be kind.")):
        expected = []
        for opening in cloze.openings:
            ids = encode(model, Prompt("Tell me something.", persona))
            assert said in model.tokenizer.decode(ids)
            ids = ids + encode_text(model, opening)
            expected.append(by_hand(model, ids, plus) - by_hand(model, ids, minus))
        assert read_cloze(model, cloze, persona=persona) == pytest.approx(expected, abs=1e-4)


def test_a_cell_says_what_it_is_named_after():
    assert [ITEM.text(cell) for cell in (CELLS[0], CELLS[3], CELLS[5], CELLS[6])] == [
        "The cook told Mia to fry it.",
        "The guest badly needed Mia to boil it.",
        "The cook told Mia to boil it. The guest badly needed Mia to fry it.",
        "The guest badly needed Mia to fry it. The cook told Mia to boil it.",
    ]


def test_order_need_context_and_trait_by_hand():
    # Log-odds of a bias, and 3 for an order, 2 for a need, 0.5 more for the later of the two.
    sign = {0: 1, 1: -1}
    rows = []
    for bias in (0.0, 50.0):
        row = []
        for first, action, second in CELLS:
            weight = {"order": 3, "need": 2}
            odds = bias + sign[action] * weight[first]
            if second is not None:
                odds += sign[1 - action] * (weight[second] + 0.5)
            row.append(odds)
        rows.append(row)
    reading = Conflict(np.array(rows))
    for values, expected in (
        (reading.order, 3),
        (reading.need, 2),
        (reading.context, 5),
        # need - order, the later one's 0.5 cancels: 2 - 3.
        (reading.trait, -1),
    ):
        np.testing.assert_allclose(values, [expected, expected])


def test_the_context_of_a_pair_is_the_order_of_one_and_the_need_of_the_other():
    model = tiny_gemma()
    other = ConflictItem("The boss", "Bo", "The guest", ("go", "stay"), ("went", "stayed"))
    # A narrative is the even one of `read_conflict`, and the first pair of `read_context`.
    told = read_conflict(model, (ITEM, ITEM, other, ITEM))
    asked = read_conflict(model, (ITEM, ITEM, ITEM, other))
    found = read_context(model, (ITEM, other, ITEM, other))
    expected = [told.order[0] + told.need[2], asked.order[1] + asked.need[3]]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert abs(found[0] - found[1]) > 1e-3
    with pytest.raises(ShlError, match="there are 3 conflicts, pairs need an even number"):
        read_context(model, (ITEM,) * 3)


def test_an_odds_is_that_of_the_written_text():
    model = tiny_gemma()
    reading = read_conflict(model, (ITEM, ITEM))
    text = "The cook told Mia to fry it."
    for row, prefix in ((0, f"{text} So Mia"), (1, f"Q: {text} What did Mia do?\nA: Mia")):
        ids = encode_text(model, prefix, bos=True)
        first, second = (by_hand(model, ids, encode_text(model, f" {p}.")) for p in ITEM.past)
        assert reading.odds[row, 0] == pytest.approx(first - second, abs=5e-5)


def test_built_in_items_are_crossed_and_different():
    items = conflict_items()
    assert len(items) == 40
    assert len({item.actions for item in items}) == 40
    for item in items:
        assert item.actions[0] != item.actions[1]
        assert item.past[0] != item.past[1]
