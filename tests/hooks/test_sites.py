"""Sites: order, widths, hooks and errors."""

import pytest
import torch
from helpers import hf_of, one_sentence, tokens_of

from shl.config import LINEAR_SITES, SITE_KINDS
from shl.hooks.sites import (
    HF_NAMES,
    band,
    check_layers,
    final_hidden,
    linear_input,
    linear_output,
    residual_after,
    sites_of,
)
from shl.models.tiny import tiny_gemma
from shl.utils.errors import ShlError


def weight_of(model, site):
    """The linear's own matrix `[out, in]` in transformers."""
    hf = hf_of(model)
    return hf.get_submodule(f"model.layers.{site.layer}.{HF_NAMES[site.kind]}").weight


@pytest.mark.parametrize("kind", LINEAR_SITES)
def test_output_at_the_hooks_is_the_weight_times_the_input(model, kind):
    (site,) = sites_of(model, [kind], [1])
    seen = {}
    module, argument = linear_input(model, site)
    before = module.register_forward_pre_hook(
        lambda _m, args, kwargs: seen.update(x=kwargs[argument] if kwargs else args[0]),
        with_kwargs=True,
    )
    if argument is None:
        before.remove()
        before = module.register_forward_hook(lambda _m, _a, out: seen.update(x=out))
    after = linear_output(model, site).register_forward_hook(lambda _m, _a, out: seen.update(y=out))
    try:
        model(tokens_of(2, 12))
    finally:
        before.remove()
        after.remove()
    x, y = seen["x"], seen["y"]
    x = x.flatten(2) if x.ndim == 4 else x
    assert torch.allclose(y.flatten(2), x @ weight_of(model, site).T, atol=1e-5)
    assert (x.shape[-1], y.flatten(2).shape[-1]) == (site.d_in, site.d_out)


def test_sites_are_unique_and_in_forward_order(gemma):
    names = [site.name for site in sites_of(gemma, ["resid", "down", "q", "q"], [2, 0, 2])]
    assert names == [f"blocks.{i}.{kind}" for i in (0, 2) for kind in ("q", "down", "resid")]
    assert len(sites_of(gemma, SITE_KINDS, range(4))) == 4 * 8


def test_unknown_site_is_rejected(gemma):
    with pytest.raises(ShlError) as error:
        sites_of(gemma, ["attn"], [0])
    assert "'attn'" in one_sentence(error)


@pytest.mark.parametrize("layer", [-1, 4, 100])
def test_layer_out_of_range_is_rejected(gemma, layer):
    for call in (
        lambda: sites_of(gemma, ["q"], [0, layer]),
        lambda: check_layers(gemma, [layer]),
        lambda: residual_after(gemma, layer),
    ):
        with pytest.raises(ShlError) as error:
            call()
        assert f"layer {layer} is out of range" in one_sentence(error)
        assert "0 to 3" in one_sentence(error)


def test_model_without_gated_mlp_is_rejected():
    model = tiny_gemma(n_layers=1)
    model.cfg.gated_mlp = False
    with pytest.raises(ShlError, match="not gated"):
        sites_of(model, ["q"], [0])


def test_residual_after_a_layer_is_the_next_layers_input(gemma):
    tokens = tokens_of(1, 9)
    _, cache = gemma.run_with_cache(tokens)
    for layer in range(3):
        assert residual_after(gemma, layer).name in (
            f"blocks.{layer}.hook_resid_post",
            f"blocks.{layer}.hook_out",
        )
        after = cache[residual_after(gemma, layer).name]
        assert torch.equal(after, cache[f"blocks.{layer + 1}.hook_resid_pre"])


def test_band_of_layers(gemma):
    # 18 layers: round(6) .. round(12); 4 layers: round(1.33) .. round(2.67)
    assert band(tiny_gemma(n_layers=18), 1 / 3, 2 / 3) == tuple(range(6, 13))
    assert band(gemma, 1 / 3, 2 / 3) == (1, 2, 3)
    assert band(gemma, 0, 1) == (0, 1, 2, 3)


def test_final_hidden_times_the_unembedding_gives_the_logits(model):
    tokens = tokens_of(2, 9)
    logits, cache = model.run_with_cache(tokens)
    last = model.cfg.n_layers - 1
    residual = cache[f"blocks.{last}.hook_resid_post"].flatten(0, 1)
    assert torch.allclose(
        final_hidden(model, residual) @ model.W_U, logits.flatten(0, 1), atol=1e-5
    )
