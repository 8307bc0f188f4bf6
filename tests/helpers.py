"""What several test files need: a tiny Llama, random adapters, and plain merged weights."""

import copy
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from shl.config import (
    LINEAR_SITES,
    DoseConfig,
    EvalConfig,
    GenerateConfig,
    HealConfig,
    LoopConfig,
    VectorConfig,
)
from shl.fast import Bridge, KVCache
from shl.hooks.adapter import fresh_adapter
from shl.hooks.sites import HF_NAMES
from shl.measure.vignettes import vignettes
from shl.models.load import build_bridge, build_model, choose_engine
from shl.models.tiny import tiny_hf, tiny_tokenizer
from shl.utils.seeds import generator_for

SIZES = {
    "vocab_size": 104,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
"""Config of tiny models of transformers."""


def tiny_llama_hf(**changes):
    own = {"max_position_embeddings": 512, "rms_norm_eps": 1e-5, "attn_implementation": "eager"}
    config = LlamaConfig(**SIZES | own | changes)
    hf = LlamaForCausalLM(config).eval().requires_grad_(False)
    fill(hf, seed=1)
    return hf


def tiny_other_hf(config):
    """A random model of transformers, of any architecture."""
    config._attn_implementation = "eager"
    hf = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    fill(hf, seed=2)
    return hf


def fill(hf, seed):
    """Weights of size 0.15, norms away from 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in hf.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.15 * noise)


def save(folder, hf, **settings):
    hf.save_pretrained(folder, **settings)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_llama(**changes):
    hf = tiny_llama_hf(**changes)
    if choose_engine("auto") == "bridge":
        return build_bridge(hf, tiny_tokenizer(), name="tiny-llama")
    return build_model(hf.config, hf.state_dict(), tiny_tokenizer(), name="tiny-llama")


def tokens_of(*shape, seed=0):
    """Random ids without the four special ones."""
    return torch.randint(4, 104, shape, generator=torch.Generator().manual_seed(seed))


def random_adapter(model, sites=LINEAR_SITES, layers=None, *, seed=0, alpha=6.0, rank=3, size=0.2):
    """A trained-looking adapter: B is random too; its scale is alpha / rank."""
    layers = tuple(range(model.cfg.n_layers)) if layers is None else layers
    config = HealConfig(rank=rank, lora_alpha=alpha, sites=tuple(sites), layers=layers)
    adapter = fresh_adapter(model, config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for up in adapter.up.values():
        up.data = size * torch.randn(up.shape, generator=generator)
    return adapter.frozen()


def merged(model, adapter):
    """A copy of the model whose weights carry s B A, as one would merge it by hand (SPEC)."""
    if isinstance(model, Bridge | MergedHF):
        return MergedHF(getattr(model, "hf", None) or hf_of(model), adapter)
    out = copy.deepcopy(model)
    cfg = model.cfg
    d, d_head, heads, kv = cfg.d_model, cfg.d_head, cfg.n_heads, cfg.n_key_value_heads
    for site in adapter.sites:
        x = adapter.scale * adapter.up[site.name] @ adapter.down[site.name]
        attn, mlp = out.blocks[site.layer].attn, out.blocks[site.layer].mlp
        match site.kind:
            case "q":
                attn.W_Q.data = attn.W_Q + x.view(heads, d_head, d).permute(0, 2, 1)
            case "k":
                attn._W_K.data = attn._W_K + x.view(kv, d_head, d).permute(0, 2, 1)
            case "v":
                attn._W_V.data = attn._W_V + x.view(kv, d_head, d).permute(0, 2, 1)
            case "o":
                attn.W_O.data = attn.W_O + x.view(d, heads, d_head).permute(1, 2, 0)
            case "gate":
                mlp.W_gate.data = mlp.W_gate + x.T
            case "up":
                mlp.W_in.data = mlp.W_in + x.T
            case "down":
                mlp.W_out.data = mlp.W_out + x.T
    return out


def hf_of(model):
    """transformers' own tiny model of the same weights."""
    return {"tiny-gemma": tiny_hf, "tiny-llama": tiny_llama_hf}[model.cfg.model_name]()


class MergedHF:
    """transformers' own tiny model, with adapters added to its weights in place."""

    def __init__(self, hf, adapter):
        self.hf = hf
        for site in adapter.sites:
            linear = hf.model.layers[site.layer].get_submodule(HF_NAMES[site.kind])
            linear.weight += adapter.scale * adapter.up[site.name] @ adapter.down[site.name]

    def __call__(self, tokens, attention_mask=None):
        return self.hf(tokens, attention_mask=attention_mask).logits


def empty_cache(model, batch):
    """TransformerLens's own cache for a HookedTransformer, ours for a bridge."""
    if isinstance(model, Bridge):
        return KVCache.empty(model, batch)
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    return TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", batch)


@contextmanager
def stock(model):
    """TransformerLens's own components on the same weights."""
    from transformer_lens.components import GroupedQueryAttention

    from shl.fast.attention import FastAttention
    from shl.fast.blocks import FASTER

    slow = {fast: own for own, fast in FASTER.items()} | {FastAttention: GroupedQueryAttention}
    changed = [(module, type(module)) for module in model.modules() if type(module) in slow]
    for module, fast in changed:
        module.__class__ = slow[fast]
    try:
        yield
    finally:
        for module, fast in changed:
            module.__class__ = fast


def hook_count(model):
    """Torch hooks on the model's modules, ours and a user's; not those that a bridge is made of or
    that transformers adds to collect attentions."""
    parts = {h.id for block in model.blocks for h in vars(block).get("_capture_hook_handles", ())}
    hooks = [
        key
        for module in model.modules()
        for key, hook in (*module._forward_hooks.items(), *module._forward_pre_hooks.items())
        if "output_captur" not in getattr(hook, "__qualname__", "")
    ]
    return len([key for key in hooks if key not in parts])


def one_sentence(error):
    """The message of an error, checked to be one line that ends like a sentence."""
    text = str(error.value)
    assert "\n" not in text, text
    assert text.endswith("."), text
    return text


def log_p_by_hand(model, completion):
    """`[tok, vocab]` log-probabilities before each completion token, float64, from full logits of
    its own unpadded row."""
    row = torch.tensor([[*completion.prompt_tokens, *completion.tokens]])
    with torch.no_grad():
        logits = model(row)[0].double()
    return logits.log_softmax(-1)[len(completion.prompt_tokens) - 1 : -1]


def nll_by_hand(model, completion):
    """Mean -log p over a completion's own tokens, nats."""
    log_p = log_p_by_hand(model, completion)
    return float(-log_p[torch.arange(len(log_p)), list(completion.tokens)].mean())


def kl_by_hand(student, reference):
    """KL(student || reference) per row of two tables of log-probabilities."""
    return (student.exp() * (student - reference)).sum(-1)


def with_drawn_contexts(axis, seed=42):
    """The axis with its contexts in the order in which a study's seed draws them."""
    order = torch.randperm(len(axis.contexts), generator=generator_for(seed, "contexts"))
    return replace(axis, contexts=tuple(axis.contexts[i] for i in order.tolist()))


def small_loop(**changes):
    """Two rounds at the smallest scale; 2 probes at each of doses 1.5 and 0.3, batches of 4."""
    settings = {
        "rounds": 2,
        "vector": VectorConfig(contexts=3),
        "generate": GenerateConfig(max_new_tokens=8, min_new_tokens=4),
        "dose": DoseConfig(
            alpha=1.5,
            kappa_min=0.2,
            rungs=2,
            probe_size=2,
            min_train=6,
            batch_size=4,
            max_batches=3,
        ),
        "heal": HealConfig(rank=2, sites=("q", "down"), epochs=2, lr=2e-2, tau=0.01),
        "eval": EvalConfig(samples=3, bootstrap=20, conflicts=4, nulls=2),
    }
    return LoopConfig(**settings | changes)


def lenient(monkeypatch, *, reasons=lambda text: []):
    """Noise passes the filter (or falls for `reasons`), and the probe has 4 vignettes."""
    scores = [(9.0, 8.0)]
    filters, probe = import_module("shl.method.filters"), import_module("shl.measure.vignettes")
    few = vignettes()[:4]
    monkeypatch.setattr(filters, "text_reasons", lambda text, *_: reasons(text))
    monkeypatch.setattr(filters, "base_perplexities", lambda _, texts, **__: scores * len(texts))
    monkeypatch.setattr(filters, "topic_scores", lambda _, texts, *__, **___: [0.5] * len(texts))
    monkeypatch.setattr(probe, "first_vignettes", lambda count: few[:count])


def quick_worker():
    """In this process the probe has 4 vignettes, and no study gets a page."""
    import experiments.arms.studies as studies

    few = vignettes()[:4]
    import_module("shl.measure.vignettes").first_vignettes = lambda count: few[:count]
    studies.report = lambda *_: None
