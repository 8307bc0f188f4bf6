"""Extraction compared with its definition; norms, cosines and files."""

from dataclasses import replace

import pytest
import torch
from helpers import random_adapter
from safetensors.torch import save_file

from shl.config import VectorConfig
from shl.hooks.bake import baked
from shl.hooks.vector import SteeringVector
from shl.method.axes import load_axis
from shl.method.extract import extract_configured, extract_vector
from shl.models.activations import residual_at_tag
from shl.models.tokens import Prompt, encode
from shl.utils.errors import ShlError

CONTEXTS = ("How do you rest?", "Lunch?", "What is a good day like, and why is that so?")


@pytest.fixture
def axis():
    return replace(load_axis("love"), contexts=CONTEXTS)


def post(layer):
    return f"blocks.{layer}.hook_resid_post"


def by_hand(model, axis, layer):
    """Mean over contexts of h+ - h- at the last token, one unpadded prompt at a time."""
    sides = []
    for persona in (axis.positive, axis.negative):
        states = []
        for context in axis.contexts:
            ids = torch.tensor([encode(model, Prompt(context, persona))])
            states.append(model.run_with_cache(ids)[1][post(layer)][0, -1])
        sides.append(torch.stack(states))
    return sides


def test_the_vector_is_the_mean_difference_at_the_last_token(model, axis):
    vector = extract_vector(model, axis, layers=[2, 0], batch_size=2)
    assert list(vector.directions) == [0, 2]
    assert (vector.axis, vector.contexts) == ("love", 3)
    for layer, v in vector.directions.items():
        positive, negative = by_hand(model, axis, layer)
        assert torch.allclose(v, positive.mean(0) - negative.mean(0), atol=1e-5)
    # Gemma's window of 8 hides the persona from the last token until layer 2, its global one.
    assert vector.directions[2].norm() > 0.01


def test_a_shared_persona_is_run_once_and_changes_no_residual(llama):
    persona = "You are calm, kind and patient with everyone whom you meet."
    prompts = [Prompt(text, persona) for text in ("Hi?", "And you?", "What do you see there?")]
    shapes = []
    handle = llama.embed.register_forward_hook(lambda *a: shapes.append(tuple(a[-1].shape[:2])))
    shared = residual_at_tag(llama, prompts, [0, 2])
    handle.remove()
    rows = [encode(llama, p) for p in prompts]
    lengths = sorted({before + after for (_, before), (_, after) in [shapes]})
    assert [batch for batch, _ in shapes] == [1, 3]
    assert lengths == [max(map(len, rows))]
    for row, ids in enumerate(rows):
        _, cache = llama.run_with_cache(torch.tensor([ids]))
        for layer in (0, 2):
            assert torch.allclose(shared[layer][row], cache[post(layer)][0, -1], atol=2e-5)


def test_residuals_are_in_the_order_of_the_prompts(model):
    prompts = ["A much longer question than the others?", "Hi?", "Why is that so?"]
    got = residual_at_tag(model, prompts, [1], batch_size=2)[1]
    for row, prompt in enumerate(prompts):
        _, cache = model.run_with_cache(torch.tensor([encode(model, prompt)]))
        assert torch.allclose(got[row], cache[post(1)][0, -1], atol=1e-5)


def test_the_vector_is_extracted_with_the_hooks_that_are_on(model, axis):
    base = extract_vector(model, axis, layers=[2])
    with baked(model, [random_adapter(model, ["v", "down"], (0, 1))]):
        student = extract_vector(model, axis, layers=[2])
        positive, negative = by_hand(model, axis, 2)
    assert torch.allclose(student.directions[2], (positive - negative).mean(0), atol=1e-5)
    assert (student.directions[2] - base.directions[2]).abs().max() > 0.01


def test_a_custom_rule_receives_paired_rows(model, axis):
    seen = []

    def median(positive, negative):
        seen.append((positive, negative))
        return (positive - negative).median(0).values

    vector = extract_vector(model, axis, layers=[2], contexts=2, rule=median)
    positive, negative = by_hand(model, replace(axis, contexts=CONTEXTS[:2]), 2)
    assert torch.allclose(seen[0][0], positive, atol=1e-5)
    assert torch.allclose(seen[0][1], negative, atol=1e-5)
    assert torch.equal(vector.directions[2], (seen[0][0] - seen[0][1]).median(0).values)


def test_a_study_draws_its_contexts_by_its_seed(gemma):
    axis, asked = load_axis("love"), {}

    def record(model, prompts, layers, **_):
        asked.setdefault(seed, [p.text for p in prompts])
        return {1: torch.randn(len(prompts), 32)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shl.method.extract.residual_at_tag", record)
        for seed in (1, 2):
            extract_configured(gemma, axis, VectorConfig(contexts=40, layers=(1,)), seed=seed)
    for drawn in asked.values():
        assert len(set(drawn)) == 40
        assert set(drawn) < set(axis.contexts)
    # Two draws of 40 of 128 share 12.5 on average; 28 or more with a probability below 1e-9.
    assert len(set(asked[1]) & set(asked[2])) < 28


def test_the_default_band_is_the_middle_third(gemma, axis):
    assert list(extract_vector(gemma, axis, contexts=1).directions) == [1, 2, 3]


def test_removed_axes_leave_nothing_of_their_directions(gemma, axis, tmp_path):
    layers, names = [2, 3], ("valence", "formality")
    whole = extract_vector(gemma, axis, layers)
    others = [
        extract_vector(gemma, replace(load_axis(name), contexts=CONTEXTS), layers) for name in names
    ]
    left = extract_vector(gemma, axis, layers, remove=names)
    # The two directions are not orthogonal.
    assert min(map(abs, others[0].cosine(others[1]).values())) > 0.05
    for layer, v in left.directions.items():
        for other in others:
            assert left.cosine(other)[layer] == pytest.approx(0, abs=1e-6)
            assert abs(whole.cosine(other)[layer]) > 0.01
        # What was taken away lies in their span.
        span = torch.stack([other.directions[layer] for other in others]).T
        gone = (whole.directions[layer] - v)[:, None]
        weights = torch.linalg.lstsq(span, gone).solution
        assert torch.allclose(span @ weights, gone, atol=1e-4)
    assert (left.axis, left.rule) == ("love", "mean_difference without valence, formality")
    left.save(tmp_path / "v.safetensors")
    assert SteeringVector.load(tmp_path / "v.safetensors").rule == left.rule


def test_removed_directions_come_from_the_model_with_its_hooks(gemma, axis):
    valence = replace(load_axis("valence"), contexts=CONTEXTS)
    with baked(gemma, [random_adapter(gemma, ["v", "down"], (0, 1))]):
        now = extract_vector(gemma, valence, [3])
        left = extract_vector(gemma, axis, [3], remove=("valence",))
    before = extract_vector(gemma, valence, [3])
    assert left.cosine(now)[3] == pytest.approx(0, abs=1e-6)
    assert abs(left.cosine(before)[3]) > 1e-3


def test_an_axis_that_lies_in_the_span_of_a_removed_one_is_rejected(gemma, axis):
    valence = load_axis("valence")
    same = replace(axis, positive=valence.positive, negative=valence.negative)
    with pytest.raises(ShlError, match="nothing of the vector of layer 3 is left without valence"):
        extract_vector(gemma, same, [3], remove=("valence",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contexts": 4}, "contexts is 4, axis 'love' has 3"),
        ({"layers": [4]}, "layer 4 is out of range"),
        ({"layers": []}, "layers is empty"),
        ({"layers": [3], "remove": ("love",)}, "'love' cannot be removed from 'love'"),
        ({"layers": [3], "remove": ("joy",)}, "'joy' cannot be removed from 'love'"),
        ({"layers": [3], "remove": ("valence",), "rule": lambda p, n: 0 * p[0]}, "is 0, it cannot"),
        ({"layers": [1], "rule": lambda p, n: p[0] * torch.nan}, "not finite"),
    ],
)
def test_invalid_requests_are_rejected(gemma, axis, options, message):
    with pytest.raises(ShlError, match=message):
        extract_vector(gemma, axis, **options)


def test_norms_and_cosines_by_hand():
    one = SteeringVector({0: torch.tensor([3.0, 4.0]), 1: torch.ones(2)}, "m", "a", 1)
    two = SteeringVector({0: torch.tensor([4.0, 3.0]), 2: torch.ones(2)}, "m", "a", 1)
    assert one.norms() == pytest.approx({0: 5.0, 1: 2**0.5})
    assert one.cosine(two) == pytest.approx({0: 24 / 25})
    with pytest.raises(ShlError, match="share none"):
        one.cosine(SteeringVector({7: torch.ones(2)}, "m", "a", 1))


def test_a_file_keeps_the_numeric_order_of_the_layers(tmp_path):
    path = tmp_path / "v.safetensors"
    vector = SteeringVector({i: torch.full((32,), i / 3) for i in (2, 10)}, "m", "love", 96)
    vector.save(path)
    back = SteeringVector.load(path)
    assert (back.model_name, back.axis, back.contexts) == ("m", "love", 96)
    assert list(back.directions) == [2, 10]
    assert all(torch.equal(back.directions[i], v) for i, v in vector.directions.items())
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(ShlError, match="format None"):
        SteeringVector.load(path)
