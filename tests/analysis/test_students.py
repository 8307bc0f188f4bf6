"""Students against the loop's own order of adapters, by hand."""

import torch
from helpers import random_adapter

from shl.analysis.cosines import students
from shl.hooks.bake import baked
from shl.method.axes import load_axis
from shl.method.extract import extract_vector
from shl.models.activations import residual_at_tag
from shl.models.tokens import Prompt

AXIS = load_axis("care_auth")
LAYERS = [1, 2]


def test_each_round_enters_with_the_rounds_before_it_and_leaves_with_its_own(model):
    adapters = [random_adapter(model, ["q", "down"], (0, 1), seed=i, size=0.05) for i in range(2)]
    found = students(model, AXIS, [[a] for a in adapters], LAYERS, contexts=3, batch_size=2)
    plain = [Prompt(context) for context in AXIS.contexts[:3]]
    base = residual_at_tag(model, plain, LAYERS)
    for index, student in enumerate(found):
        with baked(model, adapters[:index]):
            vector = extract_vector(model, AXIS, LAYERS, contexts=3)
            before = residual_at_tag(model, plain, LAYERS)
        with baked(model, adapters[: index + 1]):
            after = residual_at_tag(model, plain, LAYERS)
        for layer in LAYERS:
            mean = student.differences(layer).mean(0)
            assert torch.allclose(mean, vector.directions[layer], atol=1e-5)
            assert torch.allclose(student.neutral[layer], before[layer], atol=1e-5)
            expected = (after[layer] - base[layer]).mean(0)
            assert torch.allclose(student.shift(layer), expected, atol=1e-5)
    assert (found[0].shift(2) - found[1].shift(2)).norm() > 0.1


def test_hooks_of_the_caller_do_not_count(gemma):
    adapter = random_adapter(gemma, ["down"], (0,), size=0.05)
    (plain,) = students(gemma, AXIS, [[adapter]], [3], contexts=2)
    with baked(gemma, [random_adapter(gemma, ["up"], (1,), seed=5)]):
        (same,) = students(gemma, AXIS, [[adapter]], [3], contexts=2)
    assert torch.equal(plain.shift(3), same.shift(3))
