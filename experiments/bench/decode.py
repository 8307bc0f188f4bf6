"""Decoding, steps and whole calls: shl with hooks against transformers and TransformerLens."""

import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from experiments.bench.measure import Around, Row, Timing, interleave, speedup, timing
from shl.config import LINEAR_SITES, FilterConfig, HealConfig
from shl.hooks.adapter import Adapter, fresh_adapter
from shl.hooks.bake import baked, fused_decoding
from shl.hooks.vector import SteeringVector
from shl.measure.vignettes import vignettes
from shl.method.backtrack import Backtrack
from shl.method.filters import judge
from shl.models.generate import Completion, generate, next_logits, prefill, run
from shl.models.load import load_model
from shl.models.scores import token_nll
from shl.models.tokens import Prompt, encode, pad_left
from shl.models.weights import model_folder
from shl.utils.model import Model

Hooks = Callable[[Model], AbstractContextManager[Any]]

TURNS = 25
FILTERED = ", with the filter"
CONTEXT = 20  # tokens before the first step
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
TARGETS = {"bare": "", STEERED: ">= 0.97", BOTH: ">= 0.88"}
"""Smallest allowed time of transformers' call over ours."""
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
    """The cost of hooks per step, then whole calls, prefill included, against the peers, and of
    backtracking against plain generation."""
    return [*hook_costs(), *calls(repeats, stock_too=True), *backtracking(repeats)]


def backtracking(repeats: int = 3, rows: int = 32, new: int = 48) -> list[Row]:
    """CPU time of steered generation with backtracking over that without, at a threshold at which
    a fifth of the texts are rewound, and at one at which none is; and of both with the filter,
    which takes the scores that backtracking has."""
    model, questions = load_model(MODEL), prompts(rows, SHAPES["short"][0])
    count: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "batch_size": rows}
    steered = vector(model, range(6, 13))

    def call(backtrack: Backtrack | None) -> list[Completion]:
        with steered.steering(model, 0.5):
            return generate(model, questions, **count, backtrack=backtrack)

    def largest(losses: torch.Tensor) -> float:
        return max(float(part.mean()) for part in losses.split(Backtrack().window))

    texts = call(None)
    worst = sorted(map(largest, token_nll(model, texts)))
    loose: dict[str, Any] = {"max_rise": 1e9, "max_top_prob": 1.0}

    def at(nll: float) -> Backtrack:
        # No loop is found, so that the NLL alone decides.
        rules = FilterConfig(max_word_share=1.0, max_char_share=1.0, max_run=new)
        limit = replace(rules, max_tail_perplexity=max(math.exp(nll), rules.min_perplexity))
        return Backtrack(filter=limit, **loose)

    fifth = rows - max(1, rows // 5)
    cases = {"a fifth": at((worst[fifth - 1] + worst[fifth]) / 2), "none": at(worst[-1] + 20)}
    plain: dict[str, Callable[[], list[Completion]]] = {"plain": lambda: call(None)}
    calls = plain | {name: partial(call, backtrack) for name, backtrack in cases.items()}

    def filtered(write: Callable[[], list[Completion]]) -> Callable[[], Any]:
        return lambda: judge(model, write(), reuse_nll=True)

    calls |= {f"{name}{FILTERED}": filtered(write) for name, write in calls.items()}
    t, found = interleave(calls, repeats), []
    for name, backtrack in cases.items():
        rewinds = [len(text.rewinds) for text in call(backtrack)]
        share = sum(map(bool, rewinds)) / rows
        note = f"{100 * share:.0f} % of {rows} texts rewound, {sum(rewinds)} rewinds"
        target = "<= 1.35" if name == "a fifth" else ""
        for also in ("", FILTERED):
            ours, plainly = t[name + also].least_cpu, t["plain" + also].least_cpu
            what = f"backtracking, {name} rewound / plain{also}, {new} tokens, batch {rows}"
            found.append(Row(what, ours / plainly, target, ours, plainly, "CPU s", note))
    return found


def _baking(count: int, rank: int, **options: Any) -> Hooks:
    return lambda model: baked(model, adapters(model, count, rank), **options)


def hook_costs() -> list[Row]:
    """A step with hooks over the same step without, batch 1 and 16."""
    hooks: dict[str, Hooks] = {
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
        models = model_per_case(MODEL, hooks, stack)
        for batch in (1, 16):
            t = steps(models, prompts(batch, 20))
            rows += [
                step_row(f"a step, {case} / bare, batch {batch}", t[case], t["bare"], target)
                for case, target in COSTS.items()
            ]
            eight, one = t["8 rounds of rank 8"], t["1 round of rank 64"]
            what = f"a step, 8 rounds of rank 8 / 1 of rank 64, batch {batch}"
            rows.append(step_row(what, eight, one, "1"))
    return rows


def transformers_model(model: Model) -> Any:
    """transformers' own model, with the dtype and device of `model` and its default attention."""
    hf: Any = AutoModelForCausalLM.from_pretrained(model_folder(MODEL), dtype=model.cfg.dtype)
    hf.to(device=model.W_U.device).eval()
    hf.generation_config.max_length = None
    hf.generation_config.top_k = hf.generation_config.top_p = None
    return hf


def model_per_case(name: str, hooks: Mapping[str, Hooks], stack: ExitStack) -> dict[str, Model]:
    """A model for each case, with its hooks on until `stack` closes; the embedding is shared."""
    models: dict[str, Any] = {}
    for case, attach in hooks.items():
        model: Any = load_model(name, engine="hooked")
        if models:
            first = next(iter(models.values()))
            model.embed.W_E.data = first.embed.W_E.data
            model.unembed.W_U = first.unembed.W_U
        stack.enter_context(attach(model))
        models[case] = model
    return models


@torch.no_grad()
def steps(models: Mapping[str, Model], prompts: list[Prompt]) -> dict[str, Timing]:
    """Wall and CPU time of a greedy step, its logits included: each case once per turn."""
    caches = {}
    stack = ExitStack()
    for case, model in models.items():
        rows = [encode(model, p)[:CONTEXT] for p in prompts]
        caches[case] = prefill(model, rows, reserve=2 * TURNS)[1]
        stack.enter_context(fused_decoding(model))
    tokens = torch.full((len(prompts), 1), 1000, device=next(iter(models.values())).W_U.device)
    measured: dict[str, list[tuple[float, float, float]]] = {case: [] for case in models}
    with stack:
        for turn in range(TURNS + 3):
            for case, model in models.items():
                wall, cpu = time.perf_counter(), time.process_time()
                residual = run(model, tokens, torch.ones_like(tokens), caches[case])
                float(next_logits(model, residual, k=3)[0].sum())  # waits for a GPU
                if turn >= 3:
                    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                    measured[case].append((wall, cpu, 0.0))
    return {case: timing(turns) for case, turns in measured.items()}


def step_row(what: str, with_hooks: Timing, without: Timing, target: str) -> Row:
    """The median over turns of the ratio within a turn."""
    pairs = zip(with_hooks.wall, without.wall, strict=True)
    low, middle, high = statistics.quantiles([a / b for a, b in pairs], n=4)
    note = f"half of {TURNS} turns within {low:.2f} to {high:.2f}"
    return Row(what, middle, target, 1e3 * with_hooks.seconds, 1e3 * without.seconds, "ms", note)


def calls(
    repeats: int,
    *,
    engine: str = "auto",
    targets: Mapping[str, str] = TARGETS,
    stock_too: bool = False,
) -> list[Row]:
    """Ratios of wall times of whole calls, theirs over ours, of the cases in `targets`."""
    model = load_model(MODEL, engine=engine)
    device, hf = model.W_U.device, transformers_model(model)
    eight, one_layer = adapters(model, 8, 8), vector(model, range(9, 10))
    stock_too = stock_too and device.type == "cpu"
    plain = stock(MODEL, hf, model.tokenizer) if stock_too else None

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

    known: dict[str, Around] = {
        "bare": nullcontext,
        STEERED: lambda: one_layer.steering(model, 0.5),
        BOTH: steered_and_baked,
    }
    around = {case: known[case] for case in targets}
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
