"""The embedded gemma-3-270m itself, against transformers on the same cached folder."""

import torch
from transformers import AutoModelForCausalLM

from shl.generate import generate
from shl.models import load_model
from shl.tokens import encode
from shl.vector import SteeringVector
from shl.weights import model_folder

PROMPTS = ["What helps you fall asleep after an exciting day at the sea?", "Hi, how are you?"]
SETTINGS = {"temperature": 0.0, "max_new_tokens": 8}


def test_the_real_model_agrees_with_transformers_and_batches_with_single_rows():
    model = load_model(device="cpu")
    hf = AutoModelForCausalLM.from_pretrained(
        model_folder("gemma-3-270m"), dtype=torch.float32
    ).eval()
    rows = [encode(model, prompt) for prompt in PROMPTS]
    assert len(rows[0]) > len(rows[1]) + 4
    ids = torch.tensor(rows[:1])
    with torch.no_grad():
        difference = (model(ids) - hf(ids).logits).abs().max()
    assert float(difference) <= 1e-3

    plain = generate(model, PROMPTS, **SETTINGS)
    for row, completion in zip(rows, plain, strict=True):
        ids = torch.tensor([row])
        expected = hf.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8
        )[0, len(row) :].tolist()
        # Ours cuts a turn end ("\nQ:") off the answer, which transformers goes beyond.
        assert list(completion.tokens) == expected[: len(completion.tokens)]
        assert len(completion.tokens) >= 4 or completion.ended

    v = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    vector = SteeringVector({9: 100 * v}, "gemma-3-270m", "demo", 1)
    with vector.steering(model):
        batched = generate(model, PROMPTS, **SETTINGS)
        single = [generate(model, [prompt], **SETTINGS)[0] for prompt in PROMPTS]
    assert [c.tokens for c in batched] == [c.tokens for c in single]
    assert [c.tokens for c in batched] != [c.tokens for c in plain]
