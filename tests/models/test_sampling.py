"""One decoding step: logits equal the model's, and a grid of draws gives exact frequencies."""

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


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [200, 500, 300]),
        ({"p": [0.125] * 8}, [125] * 8),
        ({"temperature": 0.0}, [0, N, 0]),
        ({"top_k": 2}, [0, 625, 375]),  # 0.5 / 0.8 and 0.3 / 0.8
        ({"top_k": 1}, [0, N, 0]),
        ({"top_k": 99}, [200, 500, 300]),
        ({"top_p": 0.6}, [0, 625, 375]),  # 0.5 < 0.6 <= 0.5 + 0.3: two tokens remain
        ({"top_p": 0.45}, [0, N, 0]),
        ({"top_p": 0.9}, [200, 500, 300]),
        # After top_k one token has 0.625 > 0.6; with top_p first, two tokens would remain.
        ({"top_k": 2, "top_p": 0.6}, [0, N, 0]),
        ({"p": [0.5, 0.0, 0.5]}, [500, 0, 500]),
    ],
)
def test_frequencies_equal_the_truncated_distribution(settings, expected):
    assert counts(**settings) == expected


def test_temperature_flattens_or_sharpens_the_distribution():
    for temperature in (2.0, 0.5):
        weights = torch.tensor(P).double() ** (1 / temperature)
        expected = (weights / weights.sum() * N).tolist()
        # A grid of N draws can miss each edge by one.
        assert counts(temperature=temperature) == pytest.approx(expected, abs=1.0)
    assert counts(temperature=2.0)[1] < 500 < counts(temperature=0.5)[1]


@pytest.mark.parametrize("n", [3 * 512, 1000])
def test_a_large_distribution_is_sampled_in_the_order_of_its_tokens(n):
    p = torch.rand(n, generator=torch.Generator().manual_seed(0)).double()
    p[: n // 2] = 0
    p[-1] = 0
    cumulative = (p / p.sum()).cumsum(0)
    draws = torch.cat([GRID, torch.tensor([0.0, 1 - 2**-24])])
    logits = p.float().log().expand(len(draws), -1)
    got = sample(logits, draws, GenerateConfig(top_k=0, top_p=1.0))
    expected = torch.searchsorted(cumulative, draws.double(), right=True)
    # fp32 logits move an edge by 1e-7; few of the draws lie that close to one.
    assert int((got != expected).sum()) <= 1
    assert bool((p[got] > 0).all())
    assert int(got[-1]) == n - 2
    listed = torch.arange(n).flip(0).expand(len(draws), -1)
    assert torch.equal(
        sample(logits, draws, GenerateConfig(top_k=0, top_p=1.0), listed), n - 1 - got
    )


def test_token_of_zero_probability_is_never_drawn():
    logits = torch.tensor([[0.0, -torch.inf]]).expand(2, 2)
    draws = torch.tensor([0.0, 1 - 2**-24])  # the ends of torch.rand's range
    assert sample(logits, draws, GenerateConfig(top_k=0, top_p=1.0)).tolist() == [0, 0]


def test_rows_are_independent():
    logits = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
    got = sample(logits, torch.tensor([0.5, 0.5]), GenerateConfig(top_k=0, top_p=1.0))
    assert got.tolist() == [0, 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [[torch.nan, 1.0], [torch.inf, 1.0], [-torch.inf, -torch.inf]])
def test_non_finite_logits_are_rejected(temperature, bad):
    with pytest.raises(ShlError, match="not finite"):
        sample(torch.tensor([bad]), torch.zeros(1), GenerateConfig(temperature=temperature))


def test_next_logits_and_their_top_k_equal_the_last_logits_of_the_model(model):
    rows = tokens_of(2, 15).tolist()
    rows[0] = rows[0][5:]
    expected = torch.cat([model(torch.tensor([row]))[:, -1] for row in rows])
    residual, _ = prefill(model, rows)
    got, ids = next_logits(model, residual)
    assert ids.tolist() == [list(range(model.cfg.d_vocab))] * 2
    assert (got - expected).abs().max() <= 1e-4
    values, ids = next_logits(model, residual, k=5)
    largest = got.sort(-1, descending=True)
    assert ids.tolist() == largest.indices[:, :5].tolist()
    assert (values - largest.values[:, :5]).abs().max() <= 1e-5
    assert next_logits(model, residual, k=10**6)[0].shape == got.shape


def test_sampled_ids_are_those_of_tokens():
    logits, tokens = torch.tensor([[0.2, 0.5, 0.3]]).log(), torch.tensor([[7, 9, 4]])
    config = GenerateConfig(top_k=0, top_p=1.0)
    # As given: 7 to 0.2, 9 to 0.7, then 4.
    for draw, token in ((0.1, 7), (0.3, 9), (0.6, 9), (0.8, 4)):
        assert sample(logits, torch.tensor([draw]), config, tokens).tolist() == [token]
    # Of two in descending order: 9 to 0.5 / 0.8, then 4.
    for draw, token in ((0.6, 9), (0.65, 4)):
        config = GenerateConfig(top_k=2, top_p=1.0)
        assert sample(logits, torch.tensor([draw]), config, tokens).tolist() == [token]
    assert sample(logits, torch.zeros(1), GenerateConfig(temperature=0), tokens).tolist() == [9]


def test_next_logits_are_soft_capped():
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
