"""Loading a model from the cache, after imports."""

import subprocess
import sys
from collections.abc import Callable

from experiments.bench.measure import Row, interleave, spread_note

_SHL = """
import time, shl
shl.load_model.__module__
t = time.perf_counter()
model = shl.load_model("gemma-3-270m", device="cpu")
print(time.perf_counter() - t)
"""
_TRANSFORMERS = """
import time, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from shl.models.weights import model_folder
folder = model_folder("gemma-3-270m")
t = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
print(time.perf_counter() - t)
"""


def _seconds(code: str, sink: list[float]) -> Callable[[], None]:
    def run() -> None:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        sink.append(float(done.stdout.strip().splitlines()[-1]))

    return run


def bench(repeats: int = 5) -> list[Row]:
    """Each start in a fresh process; imports are not counted."""
    ours: list[float] = []
    theirs: list[float] = []
    t = interleave(
        {"shl": _seconds(_SHL, ours), "transformers": _seconds(_TRANSFORMERS, theirs)}, repeats
    )
    a, b = sorted(ours[1:])[repeats // 2], sorted(theirs[1:])[repeats // 2]
    return [
        Row("load_model / transformers' model and tokenizer", a / b, "", a, b, "s"),
        Row("load_model, after imports", a, "<= 3 s", a, None, "s", spread_note(*t.values())),
    ]
