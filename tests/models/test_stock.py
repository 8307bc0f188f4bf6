"""The method gives equal results on TransformerLens's own classes and on the fast ones."""

import pytest
import torch
from helpers import lenient, random_adapter, small_loop, tokens_of

from shl.config import HealConfig
from shl.fast import is_fast
from shl.hooks.bake import baked
from shl.measure.vignettes import evaluate
from shl.method.axes import load_axis
from shl.method.extract import extract_vector
from shl.method.heal import train_adapter
from shl.method.loop import love
from shl.models.generate import generate
from shl.models.tiny import tiny_gemma

pytestmark = pytest.mark.hooked

PROMPTS = ["Hello?", "And who are you?"]


def test_fast_false_keeps_the_classes_of_transformerlens(gemma, stock_gemma):
    from transformer_lens.components import GroupedQueryAttention, TransformerBlock

    assert is_fast(gemma)
    assert not is_fast(stock_gemma)
    assert {type(block) for block in stock_gemma.blocks} == {TransformerBlock}
    assert {type(block.attn) for block in stock_gemma.blocks} == {GroupedQueryAttention}
    tokens = tokens_of(2, 30)  # past the window of 8
    torch.testing.assert_close(gemma(tokens), stock_gemma(tokens), rtol=1e-4, atol=1e-5)


def test_vectors_evaluations_and_training_agree(gemma, stock_gemma, monkeypatch):
    lenient(monkeypatch)
    axis = load_axis("love")
    greedy = {"max_new_tokens": 12, "min_new_tokens": 12, "temperature": 0.0}
    texts = generate(gemma, PROMPTS, **greedy)
    assert texts == generate(stock_gemma, PROMPTS, **greedy)
    vectors = [extract_vector(m, axis, contexts=4) for m in (gemma, stock_gemma)]
    for layer, v in vectors[0].directions.items():
        torch.testing.assert_close(v, vectors[1].directions[layer], rtol=1e-4, atol=1e-5)
    adapter = random_adapter(gemma)
    scores = []
    for model in (gemma, stock_gemma):
        with baked(model, [adapter]), vectors[0].steering(model, 0.5):
            scores.append(torch.from_numpy(evaluate(model).log_probs))
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)
    config = HealConfig(rank=2, epochs=2, lr=2e-2, tau=0.01)
    fast, stock = (train_adapter(m, texts, config) for m in (gemma, stock_gemma))
    assert fast.steps[-1].nll == pytest.approx(stock.steps[-1].nll, rel=1e-4)
    assert fast.steps[-1].nll < 0.95 * fast.steps[0].nll
    for name, up in fast.adapter.up.items():
        torch.testing.assert_close(up, stock.adapter.up[name], rtol=1e-2, atol=1e-4)


def test_loop_runs_on_stock_classes(monkeypatch):
    lenient(monkeypatch)
    model = tiny_gemma(fast=False)
    done = list(love(model, load_axis("love"), small_loop(rounds=2)))
    assert [r.index for r in done] == [0, 1]
    assert all(norm > 0 for norm in done[1].adapter.norms().values())
