"""Adapters as hooks equal merged weights; files are read exactly or rejected."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import merged, one_sentence, random_adapter, tokens_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from shl.config import LINEAR_SITES, SITE_KINDS, HealConfig
from shl.hooks.adapter import Adapter, fresh_adapter
from shl.models.tiny import tiny_gemma
from shl.utils.errors import ShlError
from shl.utils.files import identity

TOKENS = tokens_of(2, 20)  # past the window of 8


def test_fresh_adapter_does_not_change_the_logits(model):
    base = model(TOKENS)
    layers = tuple(range(model.cfg.n_layers))
    with fresh_adapter(model, HealConfig(sites=SITE_KINDS, layers=layers)).attach(model):
        assert torch.equal(model(TOKENS), base)


@pytest.mark.parametrize("sites", [*((kind,) for kind in LINEAR_SITES), LINEAR_SITES])
def test_hooks_equal_merged_weights(model, sites):
    adapter = random_adapter(model, sites)
    weights = merged(model, adapter)
    padded = torch.ones_like(TOKENS)
    padded[0, :6] = 0
    assert (weights(TOKENS) - model(TOKENS)).abs().max() > 0.05  # the adapter has an effect
    for mask in (torch.ones_like(TOKENS), padded):
        expected = weights(TOKENS, attention_mask=mask)
        with adapter.attach(model):
            got = model(TOKENS, attention_mask=mask)
        assert (got - expected)[mask.bool()].abs().max() <= 1e-4


def test_the_residual_site_adds_s_b_a_h_after_the_layer(model):
    adapter = random_adapter(model, ["resid"], (1,), alpha=6.0, rank=3)
    a, b = adapter.down["blocks.1.resid"], adapter.up["blocks.1.resid"]
    expected = model.run_with_hooks(
        TOKENS,
        # s = 6 / 3 = 2
        fwd_hooks=[("blocks.1.hook_resid_post", lambda h, hook: h + 2.0 * (h @ a.T) @ b.T)],
    )
    with adapter.attach(model):
        assert (model(TOKENS) - expected).abs().max() <= 1e-4


def test_gradients_reach_a_and_b_only(model):
    adapter = fresh_adapter(model, HealConfig(rank=2, sites=SITE_KINDS, layers=(0, 1)))
    for up in adapter.up.values():
        up.data.normal_(generator=torch.Generator().manual_seed(0))
    with adapter.attach(model):
        model(TOKENS).square().mean().backward()
    parameters = adapter.parameters()
    assert len(parameters) == 2 * 2 * 8
    for parameter in parameters:
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.abs().max() > 0
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_at_the_start_only_b_has_a_gradient(model):
    adapter = fresh_adapter(model, HealConfig(rank=2, layers=(0,)))
    with adapter.attach(model):
        model(TOKENS).square().mean().backward()
    # d/dA passes through B = 0.
    assert all(torch.equal(a.grad, torch.zeros_like(a)) for a in adapter.down.values())
    assert all(b.grad.abs().max() > 0 for b in adapter.up.values())


def test_fresh_adapter_depends_on_its_seed(gemma):
    config = HealConfig(rank=2, sites=("q", "o"), layers=(1, 2))
    one, same, other = (fresh_adapter(gemma, config, seed=s) for s in (0, 0, 1))
    for name, a in one.down.items():
        assert torch.equal(a, same.down[name])
        assert not torch.equal(a, other.down[name])
        assert a.abs().max() <= 1 / a.shape[1] ** 0.5
    assert len({tuple(a[0, :3].tolist()) for a in one.down.values()}) == 4
    # 4 layers: from round(4 / 6) = 1 to round(20 / 6) = 3
    sites = fresh_adapter(gemma, HealConfig(rank=2)).sites
    assert {site.layer for site in sites} == {1, 2, 3}


def test_frozen_copy_is_detached(gemma):
    adapter = fresh_adapter(gemma, HealConfig(rank=2, layers=(0,)), round=3)
    frozen = adapter.frozen()
    assert not any(p.requires_grad for p in frozen.parameters())
    adapter.up["blocks.0.q"].data.fill_(1.0)
    assert frozen.up["blocks.0.q"].abs().max() == 0
    assert frozen.round == 3


def test_norms_are_those_of_the_full_update(gemma):
    adapter = random_adapter(gemma, ["q", "resid"], (0,))
    for name, norm in adapter.norms().items():
        full = adapter.scale * adapter.up[name].double() @ adapter.down[name].double()
        assert norm == pytest.approx(float(full.norm()), rel=1e-4)


def test_saved_and_loaded_adapter_is_equal(model, tmp_path):
    adapter = replace(random_adapter(model, SITE_KINDS), round=2)
    adapter.save(tmp_path / "a.safetensors")
    back = Adapter.load(tmp_path / "a.safetensors", model)
    assert (back.sites, back.scale, back.round) == (adapter.sites, adapter.scale, 2)
    assert back.model_name == model.cfg.model_name
    for one, two in zip(adapter.parameters(), back.parameters(), strict=True):
        assert torch.equal(one, two)
        assert not two.requires_grad


HOOKS_9 = ["blocks.9.attn:query_input", "blocks.9.attn.hook_q"]


def modify(path, change, meta_change, *, signed):
    """Change the tensors and metadata of a saved file, and if `signed` its identity to fit them."""
    with safe_open(str(path), "pt") as file:
        meta = json.loads(file.metadata()["shl"]) | dict(meta_change)
    tensors = load_file(path)
    change(tensors)
    if signed:
        meta["identity"] = identity(tensors, {k: v for k, v in meta.items() if k != "identity"})
    save_file(tensors, path, metadata={"shl": json.dumps(meta)})


@pytest.mark.parametrize(
    ("change", "meta", "named"),
    [
        (lambda t: t.pop("blocks.1.q.A"), {}, r"the site table of \S+\.safetensors differ at"),
        (lambda t: t.update(x=torch.ones(1)), {}, "the site table of .* differ at"),
        (lambda t: t.update({"blocks.9.q.A": t.pop("blocks.1.q.A")}), {}, "blocks.1.q.A"),
        (lambda t: t["blocks.1.q.B"].fill_(torch.nan), {}, "blocks.1.q.B.* not finite"),
        (
            lambda t: t.update({"blocks.1.q.A": torch.ones(3, 31)}),
            {},
            r"A of .* has shape \(3, 31\), by the site table it must be \(3, 32\)",
        ),
        (lambda t: None, {"format": "shl-vector-1"}, "format 'shl-vector-1'"),
        (lambda t: None, {"model": "gpt2"}, "made for gpt2"),
        (
            lambda t: None,
            {"sites": [["q", 9, 32, 64, 3, *HOOKS_9]]},
            "the site table of .* differ at",
        ),
        (
            lambda t: None,
            {"sites": [["q", 1, 32, 64, 3, *HOOKS_9]]},
            "blocks.9.attn.hook_q.* for blocks.1.q, they must be",
        ),
        (lambda t: None, {"alpha": 5.0}, r"alpha = 5.0, its tensors give 6.0"),
        (lambda t: None, {"weights": "0" * 64}, "the hash 000000000000, the model's"),
        (lambda t: None, {"dtype": "bfloat16"}, "in bfloat16, the model is in float32"),
        (lambda t: None, {"weights": None}, "no hash or dtype of the weights"),
        (lambda t: t["blocks.1.q.A"].view(-1)[:1].add_(1e-6), {}, "checksum mismatch"),
        (lambda t: t.pop("blocks.1.q.A"), {}, "checksum mismatch"),
        (lambda t: None, {"scale": 2.5}, "checksum mismatch"),
        (lambda t: None, {"round": 7}, "checksum mismatch"),
        (lambda t: None, {"identity": None}, "checksum mismatch"),
    ],
)
def test_modified_file_is_rejected(gemma, tmp_path, change, meta, named):
    path = tmp_path / "a.safetensors"
    random_adapter(gemma, ["q"], (1,)).save(path)
    modify(path, change, meta, signed=named != "checksum mismatch")
    with pytest.raises(ShlError, match=named) as error:
        Adapter.load(path, gemma)
    one_sentence(error)


def test_identity_depends_on_content_only(gemma, tmp_path):
    adapter = random_adapter(gemma, ["q"], (1,))
    for name in ("a", "b"):
        adapter.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    replace(adapter, round=3).save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() != (tmp_path / "b").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_truncated_missing_or_foreign_file_is_rejected(gemma, tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ShlError, match="cannot be read"):
        Adapter.load(path, gemma)
    random_adapter(gemma, ["q"], (1,)).save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ShlError, match="cannot be read"):
        Adapter.load(path, gemma)
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(ShlError, match="format None, it must be 'shl-adapter-3'"):
        Adapter.load(path, gemma)


def test_adapter_for_other_widths_is_rejected(gemma, llama):
    adapter = random_adapter(gemma, ["k"], (0,))  # one kv head of 16; Llama has two of 8
    with adapter.attach(llama):  # 32 to 16 on both
        pass
    with pytest.raises(ShlError, match=r"blocks\.0\.q maps 32 to 64 .* 32 to 32") as error:
        random_adapter(gemma, ["q"], (0,)).attach(llama)
    one_sentence(error)
    with pytest.raises(ShlError, match="layer 3 is out of range"):
        random_adapter(gemma, ["resid"], (3,)).attach(llama)


def test_unknown_layers_are_rejected(gemma):
    with pytest.raises(ShlError, match="layer 7 is out of range"):
        fresh_adapter(gemma, HealConfig(layers=(7,)))
    small = tiny_gemma(n_layers=2)
    with pytest.raises(ShlError, match="layer 2 is out of range"):
        random_adapter(gemma, ["o"], (2,)).attach(small)


def test_factors_that_do_not_match_their_sites_are_rejected(gemma):
    adapter = random_adapter(gemma, ["q"], (1,))
    with pytest.raises(ShlError, match="an adapter's A has sites"):
        replace(adapter, down={})
    with pytest.raises(ShlError, match=r"\(rank, 32\) and \(64, rank\)"):
        replace(adapter, up={"blocks.1.q": torch.ones(63, 3)})


def test_a_is_uniform_within_one_over_the_root_of_the_width(gemma):
    adapter = fresh_adapter(gemma, HealConfig(rank=32, sites=("q", "down")))
    for site in adapter.sites:
        a = adapter.down[site.name].detach() * site.d_in**0.5
        assert float(a.abs().max()) <= 1
        # A uniform variable within 1 has variance 1/3; four standard errors of the mean.
        assert abs(float(a.mean())) < 4 / (3 * a.numel()) ** 0.5
        assert float(a.min()) < -0.95
        assert float(a.max()) > 0.95
