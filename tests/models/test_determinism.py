"""Results depend on the seed only, not on batch sizes or global random state."""

import os
import subprocess
import sys
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
def test_sampled_texts_do_not_depend_on_batch_size_or_later_rows(model, size):
    whole = generate(model, PROMPTS, max_new_tokens=12, batch_size=12, seed=5)
    parts = generate(model, PROMPTS, max_new_tokens=12, batch_size=size, seed=5)
    assert [c.tokens for c in parts] == [c.tokens for c in whole]
    first = generate(model, PROMPTS[:4], max_new_tokens=12, batch_size=size, seed=5)
    assert first == whole[:4]


def test_round_does_not_depend_on_global_random_state_or_generation_batch_size(monkeypatch):
    lenient(monkeypatch)
    rounds = []
    for noise, size in ((0, 48), (1, 1)):
        torch.manual_seed(noise)
        torch.rand(noise)
        config = small_loop(rounds=1, generate=GenerateConfig(8, 4, batch_size=size))
        rounds.append(next(love(tiny_gemma(), AXIS, config)))
    one, two = rounds
    assert [c.tokens for c in one.kept] == [c.tokens for c in two.kept]
    assert all(map(torch.equal, one.adapter.parameters(), two.adapter.parameters()))
    assert (one.healed.evaluation.log_probs == two.healed.evaluation.log_probs).all()


ROUNDS = """
import gc
import pytest, torch
from helpers import lenient, small_loop
from shl.method.axes import load_axis
from shl.method.loop import love
from shl.models.tiny import tiny_gemma

with pytest.MonkeyPatch.context() as patch:
    lenient(patch)
    model = tiny_gemma()
    for r in love(model, load_axis("care_auth"), small_loop(rounds=5)):
        adapter = sum(x.numel() * x.element_size() for x in r.adapter.parameters())
        del r
        model(torch.ones(1, 2, dtype=torch.long))  # attention keeps tables of its last batch
        gc.collect()
        # type() runs no code of the object.
        alive = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
        print(adapter, sum(x.numel() * x.element_size() for x in alive))
        del alive
"""


def test_memory_grows_by_one_adapter_per_round():
    """In a separate process, because the type checks of the tests keep references to tensors."""
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
    assert last - first == pytest.approx(4 * adapter, abs=4096)
