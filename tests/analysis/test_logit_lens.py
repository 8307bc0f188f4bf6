"""The lens against the model's own logits, and dW's directions against dense decompositions."""

import pytest
import torch
from helpers import merged, one_sentence, random_adapter

from shl.analysis.logit_lens import logit_lens, strongest_directions, written_directions
from shl.models.tokens import decode
from shl.utils.errors import ShlError


def direction(model, seed=0):
    return torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(seed))


def test_scores_are_standardised_logits_of_the_scaled_direction(model):
    v = direction(model)
    # The final norm of a direction alone divides by its own size, which standardising undoes.
    logits = model.ln_final(1e6 * v[None, None])[0, 0] @ model.W_U
    scores = (logits - logits.mean()) / logits.std()
    tokens = logit_lens(model, v, 5)
    for listed, descending in ((tokens.raised, True), (tokens.lowered, False)):
        ids = scores.argsort(descending=descending)[:5].tolist()
        assert [text for text, _ in listed] == [decode(model, [i]) for i in ids]
        assert [z for _, z in listed] == pytest.approx(scores[ids].tolist(), abs=1e-4)


def test_length_does_not_matter_and_the_sign_swaps_the_sides(model):
    v = direction(model)
    one, longer, negative = (logit_lens(model, s * v, 4) for s in (1.0, 100.0, -1.0))
    assert [w for w, _ in one.raised] == [w for w, _ in longer.raised]
    assert [w for w, _ in one.raised] == [w for w, _ in negative.lowered]
    assert [z for _, z in one.raised] == pytest.approx([-z for _, z in negative.lowered], abs=1e-5)


def test_keep_filters_the_tokens_in_order(gemma):
    v = direction(gemma)
    everything = [w for w, _ in logit_lens(gemma, v, 104).raised]
    letters = [w for w in everything if w.isalpha()]
    assert [w for w, _ in logit_lens(gemma, v, 6, keep=str.isalpha).raised] == letters[:6]
    assert len(logit_lens(gemma, v, 999, keep=str.isalpha).lowered) == len(letters)


def test_written_direction_is_that_of_the_change_in_the_stream(model):
    """A rank-1 update much larger than the weights determines the direction of what the module
    adds to the stream, after the post-norm if there is one."""
    for kind, hook in (("o", "hook_attn_out"), ("down", "hook_mlp_out")):
        adapter = random_adapter(model, [kind], (1,), rank=1, size=1.0)
        adapter.up[f"blocks.1.{kind}"] *= 1e4
        _, cache = merged(model, adapter).run_with_cache(torch.tensor([[2, 20, 40, 60]]))
        added = cache[f"blocks.1.{hook}"][0, -1]
        written = written_directions(model, adapter, f"blocks.1.{kind}")[0]
        assert abs(float(torch.cosine_similarity(added, written, dim=0))) > 0.999
        assert float(written.norm()) == pytest.approx(1)


def test_written_directions_descend_by_singular_value(llama):
    adapter = random_adapter(llama, ["o"], (0,))
    dense = adapter.up["blocks.0.o"] @ adapter.down["blocks.0.o"]
    u = torch.linalg.svd(dense).U
    found = written_directions(llama, adapter, "blocks.0.o", k=9)  # Llama has no post-norm
    assert found.shape == (3, 32)
    assert torch.allclose((found @ u[:, :3]).abs(), torch.eye(3), atol=1e-4)


def test_strongest_sites_have_the_largest_singular_values(gemma):
    adapter = random_adapter(gemma, ["q", "o", "down", "resid"], (0, 1, 2))
    for name, factor in (("blocks.1.resid", 9), ("blocks.2.o", 8), ("blocks.0.q", 99)):
        adapter.up[name] *= factor
    assert list(strongest_directions(gemma, adapter, 2)) == ["blocks.1.resid", "blocks.2.o"]
    assert len(strongest_directions(gemma, adapter, 99)) == 9
    own = strongest_directions(gemma, adapter, 2)["blocks.2.o"]
    assert torch.equal(own, written_directions(gemma, adapter, "blocks.2.o")[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, a: logit_lens(m, torch.ones(3)), "shape (3,)"),
        (lambda m, a: logit_lens(m, torch.zeros(32)), "is 0"),
        (lambda m, a: logit_lens(m, torch.full((32,), torch.nan)), "not finite"),
        (lambda m, a: logit_lens(m, torch.ones(32), 0), "k is 0"),
        (lambda m, a: written_directions(m, a, "blocks.0.q"), "does not write"),
        (lambda m, a: written_directions(m, a, "blocks.3.o"), "no site of the adapter"),
        (lambda m, a: strongest_directions(m, a), "nowhere"),
    ],
)
def test_invalid_input_is_rejected(gemma, call, message):
    with pytest.raises(ShlError) as error:
        call(gemma, random_adapter(gemma, ["q"], (0,)))
    assert message in one_sentence(error)
