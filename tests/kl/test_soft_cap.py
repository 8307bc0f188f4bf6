"""KL and NLL of soft-capped logits, which are formed in full, with a warning."""

from functools import partial

import pytest
import torch
from helpers import fill
from transformers import Gemma3ForCausalLM

from shl.config import HealConfig
from shl.kl import (
    differentiable_nll,
    forward_kl_and_nll,
    log_probs_at,
    nll,
    nll_and_top,
    reverse_kl_and_nll,
)
from shl.method.heal import train_adapter
from shl.models.generate import generate
from shl.models.load import build_model
from shl.models.scores import token_nll
from shl.models.tiny import tiny_hf, tiny_tokenizer
from shl.utils.errors import ShlError

CAP = 3.0


def inputs(seed=0):
    g = torch.Generator().manual_seed(seed)
    h, ref = torch.randn(2, 5, 8, generator=g)
    return h, ref, torch.randn(8, 50, generator=g), torch.randint(50, (5,), generator=g)


def truth(h, w, bias=None):
    z = h.double() @ w.double() + (0.0 if bias is None else bias.double())
    return (CAP * torch.tanh(z / CAP)).log_softmax(1)


BIAS = 2 * torch.randn(50, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("bias", [None, BIAS], ids=["no bias", "bias"])
@pytest.mark.parametrize("reverse", [True, False])
def test_values_and_gradients_equal_float64(reverse, bias):
    h, ref, w, targets = inputs()
    x, y = h.clone().requires_grad_(True), h.double().requires_grad_(True)
    kernel = reverse_kl_and_nll if reverse else forward_kl_and_nll
    with pytest.warns(UserWarning, match="soft-capped at 3"):
        kl, loss = kernel(x, ref, w, targets, bias=bias, soft_cap=CAP)
    p, q = truth(y, w, bias), truth(ref, w, bias)
    expected = (p.exp() * (p - q)).sum(1) if reverse else (q.exp() * (q - p)).sum(1)
    own = -p.gather(1, targets[:, None])[:, 0]
    assert (kl - expected).abs().max() <= 1e-5
    assert (loss - own).abs().max() <= 1e-5
    (kl.sum() + 2 * loss.sum()).backward()
    (expected.sum() + 2 * own.sum()).backward()
    assert (x.grad - y.grad).abs().max() <= 1e-5


@pytest.mark.parametrize("bias", [None, BIAS], ids=["no bias", "bias"])
def test_scores_equal_float64(bias):
    h, _, w, targets = inputs()
    own = -truth(h, w, bias).gather(1, targets[:, None])[:, 0]

    def from_log_probs(h, w, targets, **more):
        return -log_probs_at(h, w, targets[:, None], **more)[:, 0]

    # With a soft cap the sum over the vocabulary is there in any case.
    no_sum = partial(from_log_probs, relative=torch.ones(len(targets), dtype=torch.bool))
    for score in (nll, differentiable_nll, from_log_probs, no_sum):
        with pytest.warns(UserWarning, match="soft-capped"):
            assert (score(h, w, targets, bias=bias, soft_cap=CAP) - own).abs().max() <= 1e-5
    with pytest.warns(UserWarning, match="soft-capped"):
        losses, top = nll_and_top(h, w, targets, bias=bias, soft_cap=CAP)
    assert (losses - own).abs().max() <= 1e-5
    assert (top - truth(h, w, bias).exp().amax(1)).abs().max() <= 1e-5


@pytest.mark.filterwarnings("ignore:the logits are soft-capped")
def test_scores_and_healing_use_the_cap_of_the_model():
    config = tiny_hf().config
    config.final_logit_softcapping = CAP
    hf = Gemma3ForCausalLM(config).eval().requires_grad_(False)
    fill(hf, seed=2)
    model = build_model(config, hf.state_dict(), tiny_tokenizer())
    texts = generate(model, ["Hi?", "And you?"], max_new_tokens=8, min_new_tokens=8)
    for c, losses in zip(texts, token_nll(model, texts), strict=True):
        row = torch.tensor([[*c.prompt_tokens, *c.tokens]])
        log_p = hf(row).logits[0, -len(c.tokens) - 1 : -1].log_softmax(-1)
        expected = -log_p.gather(1, torch.tensor(c.tokens)[:, None])[:, 0]
        assert (losses - expected).abs().max() <= 1e-4
    settings = HealConfig(rank=2, sites=("q", "down"), epochs=4, lr=2e-2, tau=0.01)
    healed = train_adapter(model, texts, settings)
    assert healed.steps[-1].nll < healed.steps[0].nll
    assert healed.steps[0].d <= 1e-6
    assert healed.steps[-1].d > 1e-4


def test_lazy_with_soft_cap_is_rejected():
    h, ref, w, targets = inputs()
    with pytest.raises(ShlError, match="lazy is True with soft_cap 3"):
        reverse_kl_and_nll(h, ref, w, targets, lazy=True, soft_cap=CAP)
