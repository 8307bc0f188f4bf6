"""A bridge equals transformers, and a HookedTransformer of the same weights, on four
architectures."""

import warnings

import pytest
import torch
from accelerate.big_modeling import attach_align_device_hook_on_blocks
from helpers import (
    SIZES,
    MergedHF,
    lenient,
    one_sentence,
    random_adapter,
    save,
    small_loop,
    tiny_llama_hf,
    tiny_other_hf,
    tokens_of,
)
from peft import PeftModel
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Gemma2Config, GPT2Config, Qwen3Config

import shl
from shl.config import LINEAR_SITES, HealConfig
from shl.fast import KVCache
from shl.hooks.adapter import Adapter
from shl.hooks.bake import baked
from shl.hooks.fingerprint import weights_hash
from shl.hooks.handle import suspended
from shl.hooks.sites import base_parameters
from shl.hooks.vector import SteeringVector
from shl.models.load import build_bridge, choose_engine, load_model
from shl.models.tiny import tiny_gemma, tiny_hf
from shl.models.tokens import encode
from shl.utils.errors import ShlError

TOKENS = tokens_of(2, 40)  # five windows of 8
LEFT = torch.ones_like(TOKENS)
LEFT[0, :13] = 0
PROMPTS = ["Hello?", "And who are you, then?"]
V = torch.randn(32, generator=torch.Generator().manual_seed(0))


def qwen3():
    return tiny_other_hf(Qwen3Config(head_dim=16, tie_word_embeddings=True, **LONG))


def gemma2():
    """Scores and logits are soft-capped, low enough that it shows."""
    caps = {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0, "sliding_window": 8}
    return tiny_other_hf(Gemma2Config(head_dim=16, query_pre_attn_scalar=16, **caps, **LONG))


LONG = SIZES | {"max_position_embeddings": 1024}
MAKERS = {"gemma3": tiny_hf, "llama": tiny_llama_hf, "qwen3": qwen3, "gemma2": gemma2}


def far(one, two):
    return float((one - two).abs().max())


@pytest.fixture(scope="module", params=MAKERS)
def maker(request):
    return MAKERS[request.param]


@pytest.fixture(scope="module")
def folder(maker, tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"), maker())


@pytest.fixture(scope="module")
def bridge(folder):
    return load_model(str(folder), engine="bridge", device="cpu")


@pytest.fixture(scope="module")
def hf(maker, bridge):
    """transformers' own model with the attention implementation that the bridge chose."""
    model = maker()
    model.set_attn_implementation(bridge.original_model.config._attn_implementation)
    return model


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def alone(model, row, mask):
    """transformers' logits of a row without its padding, at its own positions."""
    return model(row[mask.bool()][None]).logits[0]


def test_logits_equal_transformers(bridge, hf):
    expected = hf(TOKENS).logits
    assert expected.std() > 0.1
    assert far(bridge(TOKENS), expected) <= 1e-5
    long = tokens_of(1, 600)
    other = {"sdpa": "eager", "eager": "eager"}[hf.config._attn_implementation]
    assert far(bridge(long), hf(long).logits) <= 1e-5
    try:
        bridge.original_model.set_attn_implementation(other)
        assert far(bridge(long), hf(long).logits) <= 2e-4
    finally:
        bridge.original_model.set_attn_implementation(hf.config._attn_implementation)


@pytest.mark.parametrize("own_attention", [True, False])
def test_padded_and_cached_tokens_equal_rows_without_padding(bridge, hf, own_attention, request):
    """The second case has a hook on the pattern, so TransformerLens computes the attention."""
    layers = range(0 if own_attention else bridge.cfg.n_layers)
    hooks = [(f"blocks.{i}.attn.hook_pattern", lambda x, hook: x) for i in layers]
    whole = [alone(hf, *pair) for pair in zip(TOKENS, LEFT, strict=True)]
    # Rotary attention does not change with the start; learned positions would.
    given = []
    watch = bridge.decoder.register_forward_pre_hook(
        lambda m, a, kw: given.append(kw.get("position_ids")), with_kwargs=True
    )
    request.addfinalizer(watch.remove)
    with bridge.hooks(fwd_hooks=hooks):
        at_once = bridge(TOKENS, attention_mask=LEFT)
        cache = KVCache.empty(bridge, 2)
        parts = [bridge(TOKENS[:, :20], attention_mask=LEFT[:, :20], past_kv_cache=cache)]
        for at in range(20, 40):
            parts.append(bridge(TOKENS[:, at : at + 1], past_kv_cache=cache))  # noqa: PERF401
    for got in (at_once, torch.cat(parts, 1)):
        assert far(got[0, 13:], whole[0]) <= 2e-5
        assert far(got[1], whole[1]) <= 2e-5
    cached = torch.cat(given[1:], 1)
    assert cached[0, 13:].tolist() == list(range(27))
    assert cached[1].tolist() == list(range(40))


def test_residuals_equal_transformers_hidden_states(bridge, hf):
    states = hf(TOKENS, output_hidden_states=True).hidden_states
    for layer in range(bridge.cfg.n_layers):
        assert far(bridge(TOKENS, stop_at_layer=layer), states[layer]) <= 1e-5
        assert far(bridge(TOKENS, stop_at_layer=layer - bridge.cfg.n_layers), states[layer]) <= 1e-5
    last = bridge(TOKENS, stop_at_layer=bridge.cfg.n_layers)
    assert far(bridge.ln_final(last), states[-1]) <= 1e-5


def test_greedy_tokens_equal_those_of_transformers(bridge, hf):
    lengths = {"max_new_tokens": 12, "min_new_tokens": 12}
    for text in shl.generate(bridge, PROMPTS, temperature=0.0, **lengths):
        row = torch.tensor([text.prompt_tokens])
        expected = hf.generate(row, do_sample=False, **lengths)[0, row.shape[1] :]
        assert list(text.tokens) == expected.tolist()


@pytest.mark.parametrize("kind", LINEAR_SITES)
def test_an_adapter_equals_merged_weights(bridge, maker, kind):
    adapter = random_adapter(bridge, (kind,))
    expected = MergedHF(maker(), adapter)(TOKENS)
    assert far(bridge(TOKENS), expected) > 0.02
    for materialise in (False, True):
        with baked(bridge, [adapter], materialise=materialise):
            assert far(bridge(TOKENS), expected) <= 1e-4
            with suspended(bridge):
                assert far(bridge(TOKENS), expected) > 0.02


def test_hooks_act_on_the_wrapped_model_too(bridge, hf):
    view = shl.as_hf(bridge)
    assert view is bridge.original_model
    vector = SteeringVector({1: V}, bridge.cfg.model_name, "demo", 1)
    arguments = {"attention_mask": LEFT, "do_sample": False, "max_new_tokens": 9}
    theirs = hf.model.layers[1].register_forward_hook(lambda m, a, out: out + 0.75 * V)
    try:
        expected = hf.generate(TOKENS * LEFT, **arguments)
    finally:
        theirs.remove()
    with vector.steering(bridge, 0.75):
        assert torch.equal(view.generate(TOKENS * LEFT, **arguments), expected)
    # A dose that depends on the position needs the positions of a forward that we did not start.
    one = hf.model.layers[1].register_forward_hook(
        lambda m, a, out: out + (torch.arange(40) == 20)[:, None] * V
    )
    try:
        expected = hf(TOKENS).logits
    finally:
        one.remove()
    with vector.steering(bridge, positions=[20]):
        assert far(view(TOKENS).logits, expected) <= 2e-5


def test_no_weight_is_copied(bridge, maker):
    """TransformerLens 3.9 adds a bias of the logits, 4.3 nothing."""
    own = {p.untyped_storage().data_ptr(): p.numel() for p in bridge.parameters()}
    theirs = sum(p.numel() for p in maker().parameters())
    assert sum(own.values()) in (theirs, theirs + 104)


def test_check_passes(bridge):
    report = shl.check(bridge)
    assert report.ok, str(report)
    assert len(report.lines) == 8
    mode = "TransformerBridge, compatibility mode off"
    assert str(report).splitlines()[0] == f"{bridge.cfg.model_name} on a {mode}"


def test_exported_folder_has_the_adapter(bridge, folder, tmp_path):
    drift = shl.export_hf(bridge, [random_adapter(bridge)], tmp_path, folder)
    assert drift.largest <= 1e-4


def test_peft_loads_the_rounds_with_equal_logits(bridge, maker, tmp_path):
    rounds = [random_adapter(bridge, seed=seed, rank=2 + seed) for seed in (0, 1)]
    shl.export_peft(rounds, tmp_path)
    with warnings.catch_warnings():
        # PEFT uses a deprecated name of transformers.
        warnings.simplefilter("ignore", FutureWarning)
        expected = PeftModel.from_pretrained(maker(), tmp_path).eval()(TOKENS).logits
    assert far(bridge(TOKENS), expected) > 0.02
    with baked(bridge, rounds):
        assert far(bridge(TOKENS), expected) <= 1e-4


@pytest.mark.filterwarnings("ignore:the logits are soft-capped")
def test_the_method_runs(bridge, monkeypatch):
    lenient(monkeypatch)
    with torch.enable_grad():
        (done,) = shl.love(bridge, shl.load_axis("love"), small_loop(rounds=1))
    assert all(norm > 0 for norm in done.adapter.norms().values())
    assert torch.isfinite(torch.from_numpy(shl.evaluate(bridge).log_probs)).all()


def test_a_device_map_is_passed_on(folder, hf):
    devices = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    devices |= {"model.rotary_emb": "cpu"}
    devices |= {f"model.layers.{i}": "cpu" for i in range(len(hf.model.layers))}
    model = load_model(str(folder), engine="bridge", device_map=devices)
    assert far(model(TOKENS), hf(TOKENS).logits) <= 1e-5


def placed(hf, devices):
    """A model whose modules are on these devices, as accelerate places them."""
    for at, device in devices.items():
        for module in hf.get_submodule(at).modules():
            for key, p in module.named_parameters(recurse=False):
                empty = torch.empty(p.shape, device=device)
                setattr(module, key, torch.nn.Parameter(empty, requires_grad=False))
            for key, buffer in module.named_buffers(recurse=False):
                setattr(module, key, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))
    attach_align_device_hook_on_blocks(hf, devices, offload=dict.fromkeys(devices, False))
    return hf


def test_hooks_vectors_and_adapters_live_with_their_layer(maker, monkeypatch):
    """Tensors without data on two devices: an operation across both raises."""
    monkeypatch.setattr("shl.hooks.adapter.weights_hash", lambda model: "0" * 16)
    first, last = "lazy:0", "lazy:1"
    hf = maker()
    half = len(hf.model.layers) // 2
    devices = {"model.embed_tokens": first, "model.rotary_emb": first}
    devices |= {f"model.layers.{i}": (first, last)[i >= half] for i in range(len(hf.model.layers))}
    devices |= {"model.norm": last, "lm_head": last}
    hf.config.tie_word_embeddings = False
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build_bridge(placed(hf, devices), None)
        tokens = torch.zeros(2, 12, dtype=torch.long, device=first)
        at = {half - 1: first, half: last}
        vector = SteeringVector(dict.fromkeys(at, V), "tiny", "demo", 1)
        adapter = shl.hooks.adapter.fresh_adapter(model, HealConfig(rank=2, layers=tuple(at)))
        for site in adapter.sites:
            for factors in (adapter.down, adapter.up):
                assert str(factors[site.name].device) == at[site.layer]
        for on in (
            vector.steering(model, 0.5, positions=[2], gate="cosine"),
            adapter.attach(model),
            baked(model, [adapter.frozen()]),
            baked(model, [adapter.frozen()], materialise=True),
        ):
            with on:
                assert model(tokens).shape == (2, 12, 104)
                assert str(model(tokens, stop_at_layer=half).device) == first
                with suspended(model):
                    model(tokens)
        with torch.enable_grad(), adapter.attach(model):
            model(tokens).sum().backward()
        assert {str(p.grad.device) for p in adapter.parameters()} == {first, last}


# What belongs to one engine belongs to the other.


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = str(save(tmp_path_factory.mktemp("both"), tiny_hf()))
    return [load_model(folder, engine=engine, device="cpu") for engine in ("hooked", "bridge")]


@pytest.mark.hooked
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hash_is_that_of_a_hookedtransformer(dtype, tmp_path):
    for make in (tiny_hf, tiny_llama_hf):
        folder = str(save(tmp_path, make().to(dtype)))
        models = [
            load_model(folder, engine=engine, device="cpu", dtype=dtype)
            for engine in ("hooked", "bridge")
        ]
        hooked, stored = (dict(base_parameters(model)) for model in models)
        assert hooked.keys() == stored.keys()
        assert all(torch.equal(hooked[name], stored[name]) for name in hooked)
        assert weights_hash(models[0]) == weights_hash(models[1])


@pytest.mark.hooked
def test_files_of_one_engine_work_on_the_other(both, tmp_path):
    axis, logits = shl.load_axis("love"), {}
    for one, other in (both, both[::-1]):
        vector = shl.extract_vector(one, axis, contexts=4)
        vector.save(tmp_path / "v.safetensors")
        texts = shl.generate(one, PROMPTS, max_new_tokens=8, min_new_tokens=8)
        with torch.enable_grad():
            adapter = shl.heal(one, texts, HealConfig(rank=2, epochs=2, lr=2e-2, tau=0.01))
        adapter.save(tmp_path / "a.safetensors")
        for model in (one, other):
            vector = SteeringVector.load(tmp_path / "v.safetensors", model)
            adapter = Adapter.load(tmp_path / "a.safetensors", model)
            with baked(model, [adapter]), vector.steering(model, 0.7):
                logits[model] = model(TOKENS)
        assert far(logits[one], one(TOKENS)) > 0.01
        assert far(logits[one], logits[other]) <= 1e-3


@pytest.mark.hooked
def test_the_stages_agree(both):
    axis = shl.load_axis("love")
    texts = shl.generate(both[0], PROMPTS, max_new_tokens=12, min_new_tokens=12, temperature=0.0)
    vectors, adapters, scores, tokens, judged = [], [], [], [], []
    for model in both:
        vectors.append(shl.extract_vector(model, axis, layers=[1], contexts=4).directions[1])
        with torch.enable_grad():
            adapters.append(shl.heal(model, texts, HealConfig(rank=2, epochs=2, lr=2e-2, tau=0.01)))
        scores.append(torch.from_numpy(shl.evaluate(model).log_probs))
        tokens.append(shl.logit_lens(model, V).raised)
        judged.append([shl.judge(model, texts, shl.FilterConfig())])
        assert texts == shl.generate(
            model, PROMPTS, max_new_tokens=12, min_new_tokens=12, temperature=0.0
        )
    torch.testing.assert_close(*vectors, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)
    assert [t for t, _ in tokens[0]] == [t for t, _ in tokens[1]]
    for name, up in adapters[0].up.items():
        torch.testing.assert_close(up, adapters[1].up[name], rtol=1e-2, atol=1e-4)


@pytest.mark.hooked
def test_the_ledgers_agree(monkeypatch):
    lenient(monkeypatch)
    axis, both = shl.load_axis("love"), [tiny_gemma(), tiny_gemma(engine="bridge")]
    with torch.enable_grad():
        rounds = list(shl.love(both[0], axis, small_loop(rounds=2)))
    one, other = (str(shl.Ledger(rounds, model, axis)).splitlines() for model in both)
    # Layers 0 and 1 have windows of 8, so that at layer 1 the tag does not see the persona: the
    # vector is 0 up to rounding.
    one, other = ([x for x in lines if x.split()[1:2] != ["1"]] for lines in (one, other))
    assert len(one) > 10
    assert one == other


# Hooks of a user.


@pytest.mark.hooked
@pytest.mark.parametrize("compatible", [False, True])
def test_activations_have_the_names_and_values_of_a_hookedtransformer(compatible):
    bridge, hooked = tiny_gemma(engine="bridge"), tiny_gemma(fast=False)
    if compatible:
        bridge.enable_compatibility_mode(no_processing=True, disable_warnings=True)
    (_, got), (_, expected) = (model.run_with_cache(TOKENS) for model in (bridge, hooked))
    assert len(expected) > 100
    for name, value in expected.items():
        if name.endswith("attn.hook_attn_scores") and not compatible:
            lowest = torch.finfo(torch.float32).min
            value = value.masked_fill(value == -torch.inf, lowest)
        mine = got[name]
        if ".q_norm." in name or ".k_norm." in name:
            mine = mine.transpose(1, 2).reshape(value.shape)
        torch.testing.assert_close(mine, value, rtol=1e-4, atol=1e-4)


def test_names_that_the_model_lacks_are_rejected(bridge):
    """TransformerLens ignores them."""
    hooks = [("blocks.1.hook_squirrel", lambda x, hook: 0 * x)]
    for call in (
        lambda: bridge.run_with_hooks(TOKENS, fwd_hooks=hooks),
        lambda: bridge.run_with_hooks(TOKENS, bwd_hooks=hooks),
        lambda: bridge.hooks(fwd_hooks=hooks).__enter__(),
    ):
        with pytest.raises(ShlError) as error:
            call()
        assert "there is no HookPoint 'blocks.1.hook_squirrel'" in one_sentence(error)
    with pytest.raises(ShlError) as error:
        bridge(TOKENS, start_at_layer=1)
    assert "a bridge starts at the tokens" in one_sentence(error)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_hooks_on_scores_pattern_and_norms_act(bridge_gemma):
    def zero(x, hook):
        return 0 * x

    names = ("blocks.1.attn.hook_pattern", "blocks.1.attn.hook_z", "blocks.1.attn.hook_attn_scores")
    pattern, z, scores = (
        bridge_gemma.run_with_hooks(TOKENS, fwd_hooks=[(name, zero)]) for name in names
    )
    normed, out = (
        bridge_gemma.run_with_hooks(TOKENS, fwd_hooks=[(f"blocks.1.ln1.{name}", zero)])
        for name in ("hook_normalized", "hook_out")
    )
    assert far(normed, out) <= 1e-5
    assert far(normed, bridge_gemma(TOKENS)) > 0.01
    assert far(pattern, bridge_gemma(TOKENS)) > 0.01
    assert far(pattern, z) <= 1e-5
    assert far(scores, bridge_gemma(TOKENS)) > 0.01


def test_hooks_on_inputs_and_outputs_act_on_transformers_own_modules(bridge_gemma):
    """Attention's input is ln1's output, and its output is ln1_post's input."""

    def run(*names):
        hooks = [(f"blocks.1.{name}", lambda x, hook: x + V) for name in names]
        return bridge_gemma.run_with_hooks(TOKENS, fwd_hooks=hooks)

    assert far(run("attn.hook_in"), run("ln1.hook_out")) == 0
    assert far(run("attn.hook_in"), run()) > 0.01
    assert far(run("attn.hook_out"), run("ln1_post.hook_in")) == 0
    assert far(run("attn.hook_out"), run()) > 1e-4


def test_compatibility_mode_changes_no_number():
    model = tiny_gemma(engine="bridge")
    adapter, expected = random_adapter(model), model(TOKENS)
    with pytest.raises(ShlError) as error:
        model.enable_compatibility_mode()
    assert "no_processing is False" in one_sentence(error)
    model.enable_compatibility_mode(no_processing=True, disable_warnings=True)
    assert torch.equal(model(TOKENS), expected)
    with baked(model, [adapter]):
        got = model(TOKENS)
    assert far(got, MergedHF(tiny_hf(), adapter)(TOKENS)) <= 1e-4
    assert "hook_embed" in model.hook_dict


# Bad input.


def test_engines_are_chosen_by_what_is_installed(monkeypatch):
    assert choose_engine("bridge") == "bridge"
    with pytest.raises(ShlError) as error:
        choose_engine("fast")
    assert "must be one of auto, hooked, bridge" in one_sentence(error)
    monkeypatch.setattr("shl.models.load.find_spec", lambda name: None)
    assert choose_engine("auto") == "bridge"
    with pytest.raises(ShlError) as error:
        choose_engine("hooked")
    assert "pip install 'transformer-lens<4'" in one_sentence(error)


def message(folder, **settings):
    with pytest.raises(ShlError) as error:
        load_model(str(folder), engine="bridge", **settings)
    return one_sentence(error)


def test_folders_that_a_bridge_cannot_load_are_rejected(tmp_path):
    save(tmp_path, tiny_hf())
    config = GPT2Config(architectures=["SquirrelForCausalLM"])
    for part in ("", "model.layers.2"):
        device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
        device_map |= {f"model.layers.{i}": "cpu" for i in range(4)}
        device_map.pop(part, None)
        if part:
            assert "no device for model.layers.2." in message(tmp_path, device_map=device_map)
    config.save_pretrained(tmp_path)
    assert "is SquirrelForCausalLM, it must be one of the" in message(tmp_path)
    (tmp_path / "config.json").unlink()
    assert "no config.json" in message(tmp_path)


def test_a_tensor_that_is_missing_is_named(tmp_path):
    hf = tiny_hf()
    state = {k: v for k, v in hf.state_dict().items() if k != "model.layers.1.mlp.up_proj.weight"}
    save(tmp_path, hf, state_dict=state)
    assert "no tensor model.layers.1.mlp.up_proj.weight" in message(tmp_path)


@pytest.mark.hooked
def test_a_device_map_needs_a_bridge(tmp_path):
    with pytest.raises(ShlError, match="only engine='bridge' takes one"):
        load_model(str(save(tmp_path, tiny_hf())), device_map="auto")


def test_a_prompt_is_encoded_as_on_the_other_engine(bridge):
    assert encode(bridge, "Hi?")[0] == bridge.tokenizer.bos_token_id == 2
    assert bridge.tokenizer.decode(encode(bridge, "Hi?")) == "<bos>Q: Hi?\nA:"
