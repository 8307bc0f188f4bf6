"""The shared prefix of a batch's prompts is run once, with equal results."""

import pytest
import torch
from helpers import tokens_of

from shl.hooks.handle import Handle
from shl.hooks.vector import SteeringVector
from shl.models.generate import generate, prefill, run
from shl.models.tokens import Prompt

SHARED = tokens_of(20, seed=3).tolist()
# Gemma's window is 8: a prefix is shared only if the longest row fits into it.
ROWS = [SHARED + tokens_of(n, seed=n).tolist() for n in (1, 4, 9)]


# Two groups of two rows; with 3 and 2 shared tokens and up to 4 more they fit into Gemma's window.
GROUPS = [[2, 9, 7, 30, 31], [2, 9, 7, 40], [2, 8, 50, 51, 52, 53], [2, 8, 60]]


class Widths(Handle):
    """The shapes in which the first layer is called."""

    def __init__(self, model):
        super().__init__(model)
        self.seen = []
        block = model.blocks[0]
        self.add_hook(block.hook_resid_pre, lambda h: self.seen.append(tuple(h.shape[:2])))


@pytest.mark.parametrize("reserve", [1, 6])
@pytest.mark.parametrize(("rows", "group"), [(ROWS, 1), (GROUPS, 2), (GROUPS, 1)])
def test_prefill_equals_each_row_alone(model, rows, group, reserve):
    residual, cache = prefill(model, rows, reserve=reserve, group=group)
    new = tokens_of(len(rows) * reserve, seed=1).view(len(rows), reserve)
    after = run(model, new, torch.ones_like(new), cache)
    for i, row in enumerate(rows):
        alone = model(torch.tensor([row + new[i].tolist()]), stop_at_layer=model.cfg.n_layers)
        assert (residual[i, 0] - alone[0, len(row) - 1]).abs().max() <= 1e-4
        assert (after[i] - alone[0, len(row) :]).abs().max() <= 1e-4


def test_shared_prefix_is_run_once(llama):
    with Widths(llama) as widths:
        prefill(llama, ROWS)
    assert widths.seen == [(1, 20), (3, 9)]
    with Widths(llama) as widths:
        prefill(llama, [SHARED, SHARED])  # the last token is left for the rows
    assert widths.seen == [(1, 19), (2, 1)]


def test_what_a_group_shares_is_run_once(llama, gemma):
    persona = [SHARED + row[1:] for row in GROUPS]
    apart = [row if n else [3, *row] for n, row in enumerate(GROUPS)]
    tail = tokens_of(5, seed=1).tolist()
    for model, rows, seen in (
        (llama, GROUPS, [(2, 3), (4, 4)]),
        (llama, persona, [(1, 20), (2, 2), (4, 4)]),
        (llama, GROUPS[:2], [(1, 3), (2, 2)]),
        (llama, apart, [(4, 6)]),  # the first two rows have no token in common
        (gemma, GROUPS, [(2, 3), (4, 4)]),
        (gemma, [*GROUPS[:3], [2, 8, *tail, 3]], [(4, 8)]),  # 3 + 6 tokens exceed the window
    ):
        with Widths(model) as widths:
            prefill(model, rows, group=2)
        assert widths.seen == seen
    with Widths(gemma) as widths:
        prefill(gemma, GROUPS, group=2, reserve=2)  # nor do 3 + 4 and two more fit into it
    assert widths.seen == [(4, 6)]


def test_short_prefix_single_row_or_narrow_window_is_not_shared(llama, gemma):
    for model, rows, shape in (
        (llama, [[1, 2, 3, 4], [1, 2, 3, 5]], (2, 4)),
        (llama, ROWS[:1], (1, 21)),
        (gemma, ROWS, (3, 29)),
    ):
        with Widths(model) as widths:
            prefill(model, rows)
        assert widths.seen == [shape]


def test_hooks_with_per_row_values_run_every_row(llama):
    v = SteeringVector({0: torch.ones(32)}, "tiny-llama", "demo", 1)
    for dose, seen in ((1.0, [(1, 20), (3, 9)]), (torch.ones(3), [(3, 29)])):
        with Widths(llama) as widths, v.steering(llama, dose):
            prefill(llama, ROWS)
        assert widths.seen == seen
    shapes = []
    hook = ("blocks.1.hook_resid_post", lambda h, hook: shapes.append(tuple(h.shape[:2])))
    with llama.hooks(fwd_hooks=[hook]):
        prefill(llama, ROWS)
    assert shapes == [(3, 29)]


@pytest.mark.parametrize("dose", [0.7, 0.0])
def test_persona_shared_by_a_batch_gives_the_same_texts(llama, dose):
    prompts = [Prompt(text, "You are someone who sails.") for text in ("Hi?", "And you?", "z")]
    v = SteeringVector({0: torch.ones(32)}, "tiny-llama", "demo", 1)
    greedy = {"max_new_tokens": 10, "temperature": 0.0}
    with v.steering(llama, dose):
        batched = generate(llama, prompts, **greedy)
        assert batched == [generate(llama, [p], **greedy)[0] for p in prompts]
