"""The fast blocks equal TransformerLens's, and use its code wherever a hook is set."""

import pytest
import torch
from helpers import stock, tokens_of
from torch.nn import functional
from transformer_lens.components import RMSNorm

from shl.fast.blocks import FastBlock, FastRMSNorm
from shl.fast.hooked import inputs_are_read_only
from shl.fast.linear import FEW_ROWS, LARGE_WEIGHT, _parts, linear

TOKENS = tokens_of(2, 12)
UNEVEN = torch.linspace(0.1, 2.0, 32)  # Gemma norms a plain factor away


def logits_of(model):
    with torch.no_grad():
        return model(TOKENS)


def test_every_block_and_norm_is_fast(model):
    assert all(type(block) is FastBlock for block in model.blocks)
    norms = [m for m in model.modules() if isinstance(m, RMSNorm)]
    per_block = 6 if model.cfg.use_normalization_before_and_after else 2
    assert len(norms) == per_block * model.cfg.n_layers + 1
    assert all(type(m) is FastRMSNorm for m in norms)


def test_norm_equals_float64(gemma):
    norm = gemma.blocks[0].ln1
    x = (30 * torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    exact = x64 / (x64.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.w.double()
    got = norm(x)
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-6)
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), x),
        torch.autograd.grad(exact.square().sum(), x64),
        strict=True,
    ):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
    assert float(norm.eps) * 1e3 < float(norm(torch.full((1, 32), 1e-3)).abs().max())


@pytest.mark.parametrize("point", ["hook_scale", "hook_normalized"])
@pytest.mark.parametrize("norm", ["ln1", "ln2"])
def test_hooks_in_norms_fire_as_in_stock(model, norm, point):
    def run():
        seen = []

        def change(x, hook):
            seen.append(x.clone())
            return x + torch.arange(x.shape[-1]) + 1

        with model.hooks(fwd_hooks=[(f"blocks.1.{norm}.{point}", change)]):
            return seen, logits_of(model)

    plain, (seen, got) = logits_of(model), run()
    with stock(model):
        expected_seen, expected = run()
    assert len(seen) == len(expected_seen) == (3 if norm == "ln1" else 1)
    torch.testing.assert_close(seen[0], expected_seen[0])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert float((got - plain).abs().max()) > 1e-3


def test_every_hook_point_of_a_plain_forward_still_fires(model):
    def fired():
        names = []
        hooks = [
            (name, lambda x, hook: names.append(hook.name))
            for name in model.hook_dict
            # The norm's own points are above: watching them is what brings the stock block back.
            if ".ln" not in name and "norm" not in name
        ]
        with model.hooks(fwd_hooks=hooks):
            logits_of(model)
        return names

    got = fired()
    with stock(model):
        assert got == fired()
    assert len(got) > 10 * model.cfg.n_layers


def test_pre_hook_that_changes_query_input_only(model):
    def change(module, args, kwargs):
        kwargs["query_input"].mul_(UNEVEN)  # in place: keys and values must not see it

    def run():
        handle = model.blocks[1].attn.register_forward_pre_hook(change, with_kwargs=True)
        with torch.no_grad():
            assert not inputs_are_read_only(model.blocks[1].attn)
            logits = model(TOKENS)
        handle.remove()
        return logits

    got = run()
    with stock(model):
        expected = run()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    # Changing all three gives something else.
    with model.hooks(fwd_hooks=[("blocks.1.ln1.hook_normalized", lambda x, hook: UNEVEN * x)]):
        assert float((logits_of(model) - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("switch", ["use_split_qkv_input", "use_hook_mlp_in"])
def test_transformer_lens_options_take_effect(model, switch):
    point = "mlp_in" if switch == "use_hook_mlp_in" else "k_input"
    model.set_use_split_qkv_input(switch == "use_split_qkv_input")
    model.set_use_hook_mlp_in(switch == "use_hook_mlp_in")
    seen = []
    try:
        with model.hooks(fwd_hooks=[(f"blocks.0.hook_{point}", lambda x, hook: seen.append(x))]):
            logits_of(model)
    finally:
        model.set_use_split_qkv_input(False)
        model.set_use_hook_mlp_in(False)
    assert len(seen) == 1


@pytest.mark.parametrize("threads", [1, 3, 5])  # 48 rows of W do not fall into fives
@pytest.mark.parametrize("rows", [(1,), (1, 1), (3, 5), (FEW_ROWS,)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_in_parts_equals_float64(rows, with_bias, threads, monkeypatch):
    monkeypatch.setattr("shl.fast.linear.PART", 12)  # four parts
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    g = torch.Generator().manual_seed(0)
    d_out, d_in = 48, LARGE_WEIGHT // 32
    x, w, b = (torch.randn(s, generator=g) for s in ((*rows, d_in), (d_out, d_in), (d_out,)))
    bias = b if with_bias else None
    x.requires_grad_()
    whole, real = [], functional.linear
    monkeypatch.setattr(functional, "linear", lambda *args: whole.append(args) or real(*args))
    got = linear(x, w, bias)
    assert len(whole) == (threads == 1 and got.numel() == d_out)
    (grad,) = torch.autograd.grad(got.sum(), x)
    again = torch.func.vmap(lambda row: linear(row, w, bias))(x.reshape(-1, 1, d_in))
    exact = x.double() @ w.double().T + (b.double() if with_bias else 0)
    assert got.shape == (*rows, d_out)
    for found in (got, again.view(got.shape)):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(grad, w.sum(0).expand(grad.shape), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("d_out", "threads", "parts"),
    [(262_144, 2, 256), (128_256, 2, 96), (640, 2, 2), (640, 3, 2), (7, 4, 1)],
)
def test_parts_of_a_weight(d_out, threads, parts):
    """128,256 = 2^8 * 3 * 167 has no divisor from 97 to 125, 640 none of three."""
    assert _parts(d_out, threads) == parts


def test_invalid_shapes_and_dtypes_raise_torchs_errors(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x, w = torch.zeros(1, 256), torch.zeros(256, 256)
    with pytest.raises(RuntimeError, match="dtype"):
        linear(x, w, torch.zeros(256, dtype=torch.float64))
    for wrong in (x[:, :255], x.view(2, 128), x.view(1, 1, 256, 1)):
        with pytest.raises(RuntimeError, match="shapes"):
            linear(wrong, w)
    assert linear(x, w).shape == (1, 256)
