"""Decoding: ours under hooks against transformers' and TransformerLens's `generate` without any."""

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from transformer_lens import HookedTransformer
from transformers import AutoModelForCausalLM, PreTrainedModel

from experiments.bench.measure import Around, Row, interleave, spread_note
from shl.bake import baked
from shl.config import LINEAR_SITES, HealConfig
from shl.generate import generate
from shl.lora import Adapter, fresh_adapter
from shl.models import load_model
from shl.probes import vignettes
from shl.tokens import Prompt, encode, pad_left
from shl.vector import SteeringVector
from shl.weights import model_folder

MODEL = "gemma-3-270m"
SHAPES = {"short": (20, 16), "350 tokens": (350, 8)}  # words asked for, new tokens


def prompts(batch: int, words: int) -> list[Prompt]:
    """Different questions of about so many tokens."""
    texts = [v.text for v in vignettes()]
    out = []
    for row in range(batch):
        parts: list[str] = []
        while sum(len(p.split()) for p in parts) < words * 0.8:
            parts.append(texts[(row + 17 * len(parts)) % len(texts)])
        out.append(Prompt(" ".join(parts)))
    return out


def adapters(model: HookedTransformer, count: int, rank: int) -> list[Adapter]:
    """Adapters at every linear site of every layer, with updates that are small but not zero."""
    out = []
    for k in range(count):
        config = HealConfig(rank=rank, sites=LINEAR_SITES, layers=tuple(range(model.cfg.n_layers)))
        adapter = fresh_adapter(model, config, seed=k)
        generator = torch.Generator().manual_seed(k)
        for b in adapter.up.values():
            noise = torch.randn(b.shape, generator=generator)
            b.data.copy_(1e-4 * noise)
        out.append(adapter.frozen())
    return out


def vector(model: HookedTransformer, layers: range) -> SteeringVector:
    """Small directions at `layers`."""
    generator = torch.Generator().manual_seed(0)
    directions = {i: torch.randn(model.cfg.d_model, generator=generator) for i in layers}
    return SteeringVector(directions, MODEL, "bench", 1)


def stock(name: str, hf: PreTrainedModel, tokenizer: Any) -> HookedTransformer:
    """TransformerLens as it loads by itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return HookedTransformer.from_pretrained_no_processing(
            f"google/{name}", hf_model=hf, tokenizer=tokenizer, device="cpu"
        )


def bench(repeats: int = 3) -> list[Row]:
    """All shapes; rows are ratios of wall times of whole calls, prefill included."""
    model = load_model(MODEL)
    device = model.W_U.device
    hf: Any = AutoModelForCausalLM.from_pretrained(model_folder(MODEL), dtype=model.cfg.dtype)
    hf.to(device=device)
    hf.eval()
    hf.generation_config.max_length = None
    hf.generation_config.top_k = hf.generation_config.top_p = None
    n = model.cfg.n_layers
    eight, wide = adapters(model, 8, 8), adapters(model, 8, 32)
    one = adapters(model, 1, 64)
    one_layer, all_layers = vector(model, range(9, 10)), vector(model, range(n))
    plain = stock(MODEL, hf.cpu(), model.tokenizer) if device.type == "cpu" else None
    hf = hf.to(device)

    def theirs(asked: list[Prompt], new: int) -> Callable[[], Any]:
        batch = pad_left(model, [encode(model, p) for p in asked])

        def run() -> Any:
            return hf.generate(
                batch.tokens,
                attention_mask=batch.mask,
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
            )

        return run

    def ours(asked: list[Prompt], new: int) -> Callable[[], Any]:
        return lambda: generate(
            model,
            asked,
            max_new_tokens=new,
            min_new_tokens=new,
            temperature=0.0,
            batch_size=len(asked),
        )

    def lens(asked: list[Prompt], new: int) -> Callable[[], Any]:
        batch = pad_left(model, [encode(model, p) for p in asked])

        def run() -> Any:
            assert plain is not None
            return plain.generate(
                batch.tokens, max_new_tokens=new, do_sample=False, stop_at_eos=False, verbose=False
            )

        return run

    def steered_and_baked() -> ExitStack:
        on = ExitStack()
        on.enter_context(one_layer.steering(model, 0.5))
        on.enter_context(baked(model, eight))
        return on

    around: dict[str, Around] = {
        "steered": lambda: one_layer.steering(model, 0.5),
        "steered, all layers": lambda: all_layers.steering(model, 0.5),
        "steered + 8 x rank 8": steered_and_baked,
        "8 x rank 8": lambda: baked(model, eight),
        "8 x rank 32": lambda: baked(model, wide),
        "1 x rank 64": lambda: baked(model, one),
        "materialised": lambda: baked(model, eight, materialise=True),
    }
    rows = []
    for batch in (1, 16):
        for length, (words, new) in SHAPES.items():
            asked = prompts(batch, words)
            where = f"batch {batch}, {length}"
            names = ["bare", "steered", "steered + 8 x rank 8"]
            if length == "short":
                names += ["8 x rank 8", "8 x rank 32", "materialised"]
                names += ["steered, all layers", "1 x rank 64"] if batch == 1 else []
            run = ours(asked, new)
            cases = {"transformers": theirs(asked, new), **dict.fromkeys(names, run)}
            mine = {name: around[name] for name in names if name in around}
            # Whole calls of a batch take seconds: what the first of them pays is lost in those.
            t = interleave(cases, 2 if batch > 1 else repeats, mine, warm=batch == 1)
            note = spread_note(*t.values())

            def row(
                what: str,
                top: str,
                bottom: str,
                target: str,
                t: Any = t,
                where: str = where,
                note: str = note,
            ) -> Row:
                a, b = t[top].seconds, t[bottom].seconds
                return Row(f"{what}, {where}", a / b, target, b, a, "s", note)

            rows += [
                row("transformers / bare", "transformers", "bare", ""),
                row("transformers / steered at one layer", "transformers", "steered", ">= 0.97"),
                row(
                    "transformers / steered + 8 rounds of rank 8",
                    "transformers",
                    "steered + 8 x rank 8",
                    ">= 0.88",
                ),
            ]
            if length == "short":
                rows += [
                    row("steered at one layer / bare", "steered", "bare", "<= 1.02"),
                    row("8 rounds of rank 8 / bare", "8 x rank 8", "bare", "<= 1.12"),
                    row("8 rounds of rank 32 / bare", "8 x rank 32", "bare", "<= 1.30"),
                    row("8 rounds of rank 8 in the weights / bare", "materialised", "bare", "1"),
                ]
                if batch == 1:
                    rows += [
                        row(
                            "steered at all layers / bare", "steered, all layers", "bare", "<= 1.10"
                        ),
                        row("8 rounds of rank 8 / 1 of rank 64", "8 x rank 8", "1 x rank 64", "1"),
                    ]
                if plain is not None:
                    few = 16 if batch == 1 else 8
                    with steered_and_baked():
                        ours(asked, few)()
                    s = interleave(
                        {"stock": lens(asked, few), "ours": ours(asked, few)},
                        1,
                        {"ours": steered_and_baked},
                        warm=False,
                    )
                    rows.append(
                        row(
                            f"stock TransformerLens / steered + 8 rounds of rank 8, {few} tokens",
                            "stock",
                            "ours",
                            ">= 10" if batch == 1 else ">= 4.5",
                            s,
                        )
                    )
    return rows
