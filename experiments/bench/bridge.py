"""The engine `bridge` against transformers: a forward, decoding, a training step, memory."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.bench import decode, heal
from experiments.bench.measure import Row, extra_memory, interleave, speedup
from shl.models.load import load_model
from shl.models.tokens import encode, pad_left
from shl.models.weights import model_folder

TARGET = ">= 0.95"


def bench(repeats: int = 3) -> list[Row]:
    """All rows; the training step needs PEFT."""
    return [
        *forwards(repeats),
        *decode.calls(repeats, engine="bridge", targets={decode.STEERED: TARGET}),
        *heal.bench(repeats, engine="bridge", step=(heal.STEP[0], ">= 1.8")),
        loading(repeats),
    ]


@torch.no_grad()
def forwards(repeats: int) -> list[Row]:
    """Logits of all tokens of 100-token prompts, steered at one layer."""
    model = load_model(decode.MODEL, engine="bridge")
    hf, one_layer = decode.transformers_model(model), decode.vector(model, range(9, 10))
    rows = []
    for batch in (1, 16):
        tokens, mask = pad_left(model, [encode(model, p) for p in decode.prompts(batch, 100)])

        def run(called: Any, tokens: Any = tokens, mask: Any = mask) -> Callable[[], Any]:
            return lambda: called(tokens, attention_mask=mask)

        cases = {"transformers": run(hf), "ours": run(model)}
        t = interleave(cases, repeats, {"ours": lambda: one_layer.steering(model, 0.5)})
        what = f"transformers / {decode.STEERED}, a forward, batch {batch}, 100 tokens"
        rows.append(speedup(what, TARGET, t["ours"], t["transformers"]))
    return rows


def loading(repeats: int) -> Row:
    """The process's extra memory for a loaded model and its tokenizer."""
    folder = model_folder(decode.MODEL)

    def theirs() -> Any:
        hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return hf, AutoTokenizer.from_pretrained(folder)

    cases = {"theirs": theirs, "ours": lambda: load_model(decode.MODEL, engine="bridge")}
    t = interleave(cases, repeats)
    return extra_memory("ours / transformers, memory of loading", "<= 1.05", t["ours"], t["theirs"])
