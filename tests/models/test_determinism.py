"""The same seed gives the same bits, another seed does not, and batch sizes change no text."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import lenient, small_loop

from shl.config import GenerateConfig
from shl.method.axes import load_axis
from shl.method.loop import love
from shl.models.generate import generate
from shl.models.tiny import tiny_gemma

AXIS = load_axis("care_auth")
PROMPTS = [f"Tell me {'more ' * (i % 5)}about {i}?" for i in range(12)]


@pytest.mark.parametrize("size", [1, 2, 5, 32])
def test_sampled_texts_do_not_depend_on_the_batch(model, size):
    whole = generate(model, PROMPTS, max_new_tokens=24, batch_size=12, seed=5)
    parts = generate(model, PROMPTS, max_new_tokens=24, batch_size=size, seed=5)
    assert [c.tokens for c in parts] == [c.tokens for c in whole]


def test_a_text_does_not_depend_on_the_rows_after_it(model):
    whole = generate(model, PROMPTS, max_new_tokens=12, seed=5)
    first = generate(model, PROMPTS[:4], max_new_tokens=12, seed=5)
    assert [c.tokens for c in first] == [c.tokens for c in whole[:4]]


def test_global_random_state_plays_no_part(monkeypatch):
    lenient(monkeypatch)
    rounds = []
    for noise in (0, 1):
        torch.manual_seed(noise)
        torch.rand(noise)
        rounds.append(next(love(tiny_gemma(), AXIS, small_loop(rounds=1))))
    one, two = rounds
    assert [c.tokens for c in one.kept] == [c.tokens for c in two.kept]
    assert all(map(torch.equal, one.adapter.parameters(), two.adapter.parameters()))
    assert (one.healed.evaluation.log_probs == two.healed.evaluation.log_probs).all()


def test_smaller_generation_batches_keep_the_same_texts(monkeypatch):
    lenient(monkeypatch)
    config = small_loop(rounds=1)
    small = replace(config, generate=GenerateConfig(8, 4, batch_size=1))
    one, two = (next(love(tiny_gemma(), AXIS, c)) for c in (config, small))
    assert [c.tokens for c in one.kept] == [c.tokens for c in two.kept]
    assert all(map(torch.equal, one.adapter.parameters(), two.adapter.parameters()))


ROUNDS = """
import gc
import pytest, torch
from helpers import lenient, small_loop
from shl.method.axes import load_axis
from shl.method.loop import love
from shl.models.tiny import tiny_gemma

with pytest.MonkeyPatch.context() as patch:
    lenient(patch)
    for r in love(tiny_gemma(), load_axis("care_auth"), small_loop(rounds=5)):
        adapter = sum(x.numel() * x.element_size() for x in r.adapter.parameters())
        del r
        gc.collect()
        # Asking for an object's type runs no code of its own.
        alive = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
        print(adapter, sum(x.numel() * x.element_size() for x in alive))
        del alive  # or it would keep what it counts
"""


def test_what_a_round_leaves_in_memory_is_its_adapter():
    """In a process of its own: the checks of types and shapes hold on to what they have seen."""
    folder = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", ROUNDS],
        env=os.environ | {"PYTHONPATH": f"{folder.parent}:{folder}"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    (adapter, first), *_, (_, last) = found
    assert len(found) == 5
    # Attention keeps the tables of its last batch, whose size varies by some kilobytes.
    assert last - first == pytest.approx(4 * adapter, abs=4096)
