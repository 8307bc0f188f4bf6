"""Decoding: shl with hooks against `generate` of transformers and TransformerLens without."""

import warnings
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from experiments.bench import turns
from experiments.bench.measure import Around, Row, interleave, speedup
from shl.config import LINEAR_SITES, HealConfig
from shl.hooks.adapter import Adapter, fresh_adapter
from shl.hooks.bake import baked
from shl.hooks.vector import SteeringVector
from shl.measure.vignettes import vignettes
from shl.models.generate import generate
from shl.models.load import load_model
from shl.models.tokens import Prompt, encode, pad_left
from shl.models.weights import model_folder
from shl.utils.model import Model

MODEL = "gemma-3-270m"
STEERED, BOTH = "steered at one layer", "steered + 8 rounds of rank 8"
COSTS = {
    STEERED: "<= 1.02",
    "steered at all layers": "<= 1.10",
    "8 rounds of rank 8": "<= 1.12",
    "8 rounds of rank 8, as hooks": "",
    "8 rounds of rank 32": "<= 1.30",
    "8 rounds of rank 8 in the weights": "1",
}
"""Largest allowed time of a step with these hooks over one without."""
SHAPES = {"short": (20, 16), "350 tokens": (350, 8)}  # length of the prompt, new tokens


def prompts(batch: int, length: int) -> list[Prompt]:
    """Different prompts of about `length` tokens, made of vignettes."""
    texts = [v.text for v in vignettes()]
    out = []
    for row in range(batch):
        parts: list[str] = []
        while sum(len(p.split()) for p in parts) < length * 0.8:
            parts.append(texts[(row + 17 * len(parts)) % len(texts)])
        out.append(Prompt(" ".join(parts)))
    return out


def adapters(model: Model, count: int, rank: int) -> list[Adapter]:
    """Adapters at every linear site of every layer, with updates that are small but not zero."""
    out = []
    for k in range(count):
        config = HealConfig(rank=rank, sites=LINEAR_SITES, layers=tuple(range(model.cfg.n_layers)))
        adapter = fresh_adapter(model, config, seed=k)
        generator = torch.Generator().manual_seed(k)
        for b in adapter.up.values():
            b.data.copy_(1e-4 * torch.randn(b.shape, generator=generator))
        out.append(adapter.frozen())
    return out


def vector(model: Model, layers: range) -> SteeringVector:
    """Small directions at `layers`."""
    generator = torch.Generator().manual_seed(0)
    directions = {i: torch.randn(model.cfg.d_model, generator=generator) for i in layers}
    return SteeringVector(directions, MODEL, "bench", 1)


def stock(name: str, hf: PreTrainedModel, tokenizer: Any) -> Any:
    """A HookedTransformer without any of our classes."""
    from transformer_lens import HookedTransformer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return HookedTransformer.from_pretrained_no_processing(
            f"google/{name}", hf_model=hf, tokenizer=tokenizer, device="cpu"
        )


def bench(repeats: int = 3) -> list[Row]:
    """The cost of hooks per step, then whole calls, prefill included, against the peers."""
    return [*hook_costs(), *calls(repeats)]


def _baking(count: int, rank: int, **options: Any) -> turns.Hooks:
    return lambda model: baked(model, adapters(model, count, rank), **options)


def hook_costs() -> list[Row]:
    """A step with hooks over the same step without, batch 1 and 16."""
    hooks: dict[str, turns.Hooks] = {
        "bare": lambda _: nullcontext(),
        STEERED: lambda m: vector(m, range(9, 10)).steering(m, 0.5),
        "steered at all layers": lambda m: vector(m, range(m.cfg.n_layers)).steering(m, 0.5),
        "8 rounds of rank 8": _baking(8, 8),
        "8 rounds of rank 8, as hooks": _baking(8, 8, fused=False),
        "8 rounds of rank 32": _baking(8, 32),
        "1 round of rank 64": _baking(1, 64),
        "8 rounds of rank 8 in the weights": _baking(8, 8, materialise=True),
    }
    rows = []
    with ExitStack() as stack:
        models = turns.model_per_case(MODEL, hooks, stack)
        for batch in (1, 16):
            t = turns.steps(models, prompts(batch, 20))
            rows += [
                turns.row(f"a step, {case} / bare, batch {batch}", t[case], t["bare"], target)
                for case, target in COSTS.items()
            ]
            eight, one = t["8 rounds of rank 8"], t["1 round of rank 64"]
            what = f"a step, 8 rounds of rank 8 / 1 of rank 64, batch {batch}"
            rows.append(turns.row(what, eight, one, "1"))
    return rows


def calls(repeats: int) -> list[Row]:
    """Ratios of wall times of whole calls, theirs over ours."""
    model = load_model(MODEL)
    device = model.W_U.device
    hf: Any = AutoModelForCausalLM.from_pretrained(model_folder(MODEL), dtype=model.cfg.dtype)
    hf.to(device=device).eval()
    hf.generation_config.max_length = None
    hf.generation_config.top_k = hf.generation_config.top_p = None
    eight, one_layer = adapters(model, 8, 8), vector(model, range(9, 10))
    plain = stock(MODEL, hf, model.tokenizer) if device.type == "cpu" else None

    def theirs(questions: list[Prompt], new: int) -> Callable[[], Any]:
        tokens, mask = pad_left(model, [encode(model, p) for p in questions])
        count: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new}
        return lambda: hf.generate(tokens, attention_mask=mask, do_sample=False, **count)

    def ours(questions: list[Prompt], new: int) -> Callable[[], Any]:
        count: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new}
        return lambda: generate(
            model, questions, temperature=0.0, batch_size=len(questions), **count
        )

    def lens(questions: list[Prompt], new: int) -> Callable[[], Any]:
        tokens, _ = pad_left(model, [encode(model, p) for p in questions])
        assert plain is not None
        return lambda: plain.generate(
            tokens, max_new_tokens=new, do_sample=False, stop_at_eos=False, verbose=False
        )

    def steered_and_baked() -> ExitStack:
        on = ExitStack()
        on.enter_context(one_layer.steering(model, 0.5))
        on.enter_context(baked(model, eight))
        return on

    around: dict[str, Around] = {
        "bare": nullcontext,
        STEERED: lambda: one_layer.steering(model, 0.5),
        BOTH: steered_and_baked,
    }
    targets = {"bare": "", STEERED: ">= 0.97", BOTH: ">= 0.88"}
    rows = []
    for batch in (1, 16):
        for name, (length, new) in SHAPES.items():
            questions = prompts(batch, length)
            where = f"batch {batch}, {name}"
            cases = dict.fromkeys(around, ours(questions, new))
            cases = {"transformers": theirs(questions, new)} | cases
            # Whole calls of a batch take seconds, beside which the cost of warming up is small.
            t = interleave(cases, repeats if batch == 1 else 2, around, warm=batch == 1)
            rows += [
                speedup(f"transformers / {case}, {where}", target, t[case], t["transformers"])
                for case, target in targets.items()
            ]
            if name == "short" and plain is not None:
                few, target = (16, ">= 10") if batch == 1 else (8, ">= 4.5")
                with steered_and_baked():
                    ours(questions, few)()
                cases = {"stock": lens(questions, few), "ours": ours(questions, few)}
                t = interleave(cases, 2, {"ours": steered_and_baked}, warm=False)
                what = f"stock TransformerLens / {BOTH}, {few} tokens, {where}"
                rows.append(speedup(what, target, t["ours"], t["stock"]))
    return rows
