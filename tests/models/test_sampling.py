"""One step: the last logits are the model's, and a uniform grid of draws gives exact shares."""

import pytest
import torch
from helpers import fill, tokens_of
from transformers import Gemma3ForCausalLM

from shl.config import GenerateConfig
from shl.models.generate import next_logits, prefill, sample
from shl.models.load import build_model
from shl.models.tiny import tiny_hf
from shl.utils.errors import ShlError

N = 1000
GRID = (torch.arange(N) + 0.5) / N
P = [0.2, 0.5, 0.3]  # not in order


def counts(p=P, **settings):
    config = GenerateConfig(**{"top_k": 0, "top_p": 1.0} | settings)
    logits = torch.tensor([p]).log().expand(N, -1) + 3.0  # softmax ignores a shift
    return torch.bincount(sample(logits, GRID, config), minlength=len(p)).tolist()


def test_draws_follow_the_distribution():
    assert counts() == [200, 500, 300]
    assert counts([0.125] * 8) == [125] * 8


def test_temperature_flattens_and_sharpens():
    for temperature in (2.0, 0.5):
        weights = torch.tensor(P).double() ** (1 / temperature)
        expected = (weights / weights.sum() * N).tolist()
        # A grid of N draws can miss each edge by one.
        assert counts(temperature=temperature) == pytest.approx(expected, abs=1.0)
    assert counts(temperature=2.0)[1] < 500 < counts(temperature=0.5)[1]


def test_temperature_zero_is_greedy():
    assert counts(temperature=0.0) == [0, N, 0]


def test_top_k_keeps_the_likeliest_and_renormalises():
    # 0.5 / 0.8 and 0.3 / 0.8
    assert counts(top_k=2) == [0, 625, 375]
    assert counts(top_k=1) == [0, N, 0]
    assert counts(top_k=99) == counts()


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    # 0.5 < 0.6 <= 0.5 + 0.3: two words stay
    assert counts(top_p=0.6) == [0, 625, 375]
    assert counts(top_p=0.45) == [0, N, 0]
    assert counts(top_p=0.9) == [200, 500, 300]


def test_top_p_acts_within_top_k():
    # top_k leaves 0.625 and 0.375; 0.625 > 0.6, so one word stays. Before it, two would.
    assert counts(top_k=2, top_p=0.6) == [0, N, 0]


def test_a_token_of_zero_probability_is_never_drawn():
    assert counts([0.5, 0.0, 0.5]) == [500, 0, 500]
    logits = torch.tensor([[0.0, -torch.inf]])
    for draw in (0.0, 1 - 2**-24):  # the ends of torch.rand's range
        got = sample(logits, torch.tensor([draw]), GenerateConfig(top_k=0, top_p=1.0))
        assert int(got) == 0


def test_rows_are_independent():
    logits = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
    got = sample(logits, torch.tensor([0.5, 0.5]), GenerateConfig(top_k=0, top_p=1.0))
    assert got.tolist() == [0, 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [[torch.nan, 1.0], [torch.inf, 1.0], [-torch.inf, -torch.inf]])
def test_logits_that_are_not_finite_are_refused(temperature, bad):
    with pytest.raises(ShlError, match="not finite"):
        sample(torch.tensor([bad]), torch.zeros(1), GenerateConfig(temperature=temperature))


def test_next_logits_are_the_models_last_logits(model):
    rows = tokens_of(2, 15).tolist()
    rows[0] = rows[0][5:]
    expected = torch.cat([model(torch.tensor([row]))[:, -1] for row in rows])
    residual, _ = prefill(model, rows)
    got, ids = next_logits(model, residual)
    assert ids.tolist() == [list(range(model.cfg.d_vocab))] * 2
    assert (got - expected).abs().max() <= 1e-4


def test_the_k_largest_come_in_order_with_their_tokens(model):
    residual, _ = prefill(model, tokens_of(2, 15).tolist())
    full, _ = next_logits(model, residual)
    values, ids = next_logits(model, residual, k=5)
    expected = full.sort(-1, descending=True)
    assert ids.tolist() == expected.indices[:, :5].tolist()
    assert (values - expected.values[:, :5]).abs().max() <= 1e-5
    everything, _ = next_logits(model, residual, k=10**6)
    assert everything.shape == full.shape


def test_tokens_name_what_the_logits_belong_to():
    logits, tokens = torch.tensor([[0.2, 0.5, 0.3]]).log(), torch.tensor([[7, 9, 4]])
    config = GenerateConfig(top_k=0, top_p=1.0)
    # Descending: 9 to 0.5, 4 to 0.8, then 7.
    for draw, token in ((0.4, 9), (0.6, 4), (0.9, 7)):
        assert sample(logits, torch.tensor([draw]), config, tokens).tolist() == [token]
    assert sample(logits, torch.zeros(1), GenerateConfig(temperature=0), tokens).tolist() == [9]


def test_next_logits_are_capped_like_the_models():
    config = tiny_hf().config
    config.final_logit_softcapping = 3.0
    hf = Gemma3ForCausalLM(config).eval().requires_grad_(False)
    fill(hf, seed=2)
    capped = build_model(config, hf.state_dict(), None)
    rows = tokens_of(2, 15)
    expected = hf(rows).logits[:, -1]
    residual = capped(rows, stop_at_layer=capped.cfg.n_layers)[:, -1:]
    got, _ = next_logits(capped, residual)
    assert (got - expected).abs().max() <= 1e-4
    values, ids = next_logits(capped, residual, k=3)
    assert (values - expected.gather(1, ids)).abs().max() <= 1e-4
