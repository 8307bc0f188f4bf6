"""How many rows of a batch fit a limit of memory, from arithmetic on shapes alone.

Nothing is measured at run time, so the same settings give the same batches, and with them the same
bits, in every process.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformer_lens import HookedTransformer

from shl.axes import Axis
from shl.config import LoopConfig
from shl.errors import check
from shl.probes import vignettes
from shl.shortlist import applies
from shl.tokens import Prompt, encode, encode_text

LIBRARIES = 0.8e9
"""Bytes that Python, its packages and their buffers (on a GPU: the CUDA context) take beside the
model; with the smallest batches gemma-3-270m peaked at 3.20 GB, which this bounds."""


@dataclass(frozen=True)
class Needs:
    """Bytes: what is there at any batch size, and what each row of a stage adds at its peak."""

    fixed: float
    generate: float
    score: float
    vector: float
    evaluate: float
    heal: float


def needs(model: HookedTransformer, axis: Axis, config: LoopConfig) -> Needs:
    """Estimates for the longest texts of each stage.

    A forward pass holds about 8 d_model + 5 d_mlp + 6 d_attn numbers per token at its widest
    layer, a backward pass 8 d_model + 5 d_mlp + 5 d_attn per token and layer (fitted to peak
    resident memory on gemma-3-270m, where both are within a fifth); a cache 2 d_kv per token and
    layer, twice while finished rows leave.

    Example:
        >>> from shl.axes import load_axis
        >>> from shl.tiny import tiny_gemma
        >>> found = needs(tiny_gemma(), load_axis("love"), LoopConfig())
        >>> found.heal > found.score > 0
        True
    """
    cfg = model.cfg
    size = model.W_U.element_size()
    attn = cfg.n_heads * cfg.d_head
    d_mlp = cfg.d_mlp or 4 * cfg.d_model
    kv = 2 * cfg.n_layers * (cfg.n_key_value_heads or cfg.n_heads) * cfg.d_head * size
    forward = size * (8 * cfg.d_model + 5 * d_mlp + 6 * attn)
    backward = size * cfg.n_layers * (8 * cfg.d_model + 5 * d_mlp + 5 * attn)
    personas = (None, axis.positive, axis.negative)
    prompt = _longest(model, axis.prompts, personas)
    context = _longest(model, axis.contexts[: config.vector.contexts], personas[1:])
    whole = prompt + config.generate.max_new_tokens
    # What is trained on was steered, not prompted with a persona.
    learnt = _longest(model, axis.prompts, (None,)) + config.generate.max_new_tokens
    item = max(len(encode_text(model, v.text)) for v in vignettes()) + context
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    # The bf16 copy of the unembedding that decoding takes, and what making it takes meanwhile.
    rough = 0.93 * model.W_U.numel() * size if applies(model) else 0
    logits = 6 * cfg.d_vocab
    return Needs(
        fixed=LIBRARIES + weights + rough,
        generate=2 * kv * whole + forward * prompt + logits,
        score=forward * whole + logits / 4,
        vector=forward * context,
        evaluate=8 * kv * item + forward * item + logits,
        heal=backward * learnt + logits,
    )


def fit(model: HookedTransformer, axis: Axis, config: LoopConfig, limit: float) -> LoopConfig:
    """The settings with batches lowered to where every stage stays within `limit` bytes.

    Batches of generation, scoring, extraction and evaluation shrink; training keeps its batches
    and takes fewer completions at a time through the model (`heal.rows`). The results differ in
    their last bits only.

    Raises:
        ShlError: one row of a stage does not fit; the sentence says how much it takes.

    Example:
        >>> from shl.axes import load_axis
        >>> from shl.tiny import tiny_gemma
        >>> roomy = fit(tiny_gemma(), load_axis("love"), LoopConfig(), 64e9)
        >>> roomy.generate.batch_size == LoopConfig().generate.batch_size
        True
    """
    found = needs(model, axis, config)
    room = limit - found.fixed

    def rows(wanted: int, each: float, stage: str) -> int:
        check(
            room >= each,
            f"max_memory is {limit / 1e9:.2f} GB, {stage} of a single row takes "
            f"{(found.fixed + each) / 1e9:.2f} GB with this model.",
        )
        return min(wanted, int(room / each))

    ask = config
    at_a_time = ask.heal.rows or ask.heal.batch_size
    return replace(
        ask,
        generate=replace(
            ask.generate,
            batch_size=rows(ask.generate.batch_size, found.generate, "generation"),
        ),
        filter=replace(ask.filter, batch_size=rows(ask.filter.batch_size, found.score, "scoring")),
        vector=replace(
            ask.vector, batch_size=rows(ask.vector.batch_size, found.vector, "extraction")
        ),
        eval=replace(ask.eval, batch_size=rows(ask.eval.batch_size, found.evaluate, "evaluation")),
        heal=replace(ask.heal, rows=rows(at_a_time, found.heal, "training")),
    )


def _longest(model: HookedTransformer, texts: Sequence[str], personas: Sequence[str | None]) -> int:
    """Tokens of the longest text under any of the personas."""
    return max(len(encode(model, Prompt(text, p))) for text in texts for p in personas)
