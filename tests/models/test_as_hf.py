"""`as_hf` equals transformers' own model on the same weights."""

import copy
import gc

import pytest
import torch
from helpers import hook_count, merged, one_sentence, random_adapter, tiny_llama_hf, tokens_of
from transformers import DynamicCache, GenerationMixin, LogitsProcessorList, PreTrainedModel

from shl.hooks.bake import baked
from shl.hooks.handle import suspended
from shl.hooks.vector import SteeringVector
from shl.models.as_hf import HookedCache, as_hf
from shl.models.tiny import tiny_hf
from shl.utils.errors import ShlError

pytestmark = pytest.mark.hooked

TOKENS = tokens_of(3, 20)  # Gemma's window is 8
LEFT = torch.ones_like(TOKENS)
LEFT[0, :7], LEFT[1, :2] = 0, 0
RIGHT = LEFT.flip(1)
PADDED = TOKENS * LEFT  # the padding token is 0
NEW = tokens_of(3, 5, seed=1)
GREEDY = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def view(model):
    return as_hf(model)


@pytest.fixture
def fast_view(gemma):
    return as_hf(gemma)


@pytest.fixture(scope="module")
def originals():
    return {"tiny-gemma": tiny_hf(), "tiny-llama": tiny_llama_hf()}


@pytest.fixture
def hf(model, originals):
    return originals[model.cfg.model_name]


V = torch.randn(32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def vector(model):
    return SteeringVector({1: V}, model.cfg.model_name, "demo", 1)


def far(got, expected, mask=None):
    where = (slice(None),) * 2 if mask is None else mask.bool()
    return float((got[where] - expected[where]).abs().max())


@pytest.mark.parametrize("mask", [None, LEFT, RIGHT])
def test_logits_loss_and_hidden_states_equal_transformers(view, hf, mask):
    # RIGHT's padded columns are last in every row, so both count the same positions.
    # Predictions at padded columns are not compared, nor that of the first real token.
    own = torch.ones_like(TOKENS) if mask is None else mask
    labels = TOKENS.masked_fill((own * own.roll(1, 1).index_fill(1, torch.tensor(0), 1)) == 0, -100)
    arguments = {"attention_mask": mask, "labels": labels, "output_hidden_states": True}
    ours, theirs = (m(TOKENS, **arguments) for m in (view, hf))
    assert theirs.logits.std() > 0.1
    assert far(ours.logits, theirs.logits, mask) <= 1e-5
    assert ours.loss == pytest.approx(float(theirs.loss), abs=1e-5)
    assert len(ours.hidden_states) == len(theirs.hidden_states)
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert far(a, b, mask) <= 1e-5
    assert far(view(TOKENS, attention_mask=mask, logits_to_keep=3).logits, ours.logits[:, -3:]) == 0
    some = torch.tensor([0, 4])
    part = view(TOKENS, attention_mask=mask, logits_to_keep=some).logits
    assert far(part, ours.logits[:, some]) <= 1e-6
    as_tuple = view(TOKENS, attention_mask=mask, return_dict=False, use_cache=False)
    assert len(as_tuple) == 1
    assert far(as_tuple[0], ours.logits) == 0


def continued(model, tokens, mask, new):
    """Logits of `new`, in two parts, after a cache of `tokens`."""
    cache = model(tokens, attention_mask=mask, use_cache=True).past_key_values
    first = model(new[:, :2], past_key_values=cache)
    second = model(new[:, 2:], past_key_values=first.past_key_values)
    return torch.cat([first.logits, second.logits], 1)


def test_cached_continuation_equals_transformers(view, hf):
    ours = continued(view, TOKENS, None, NEW)
    assert far(ours, continued(hf, TOKENS, None, NEW)) <= 1e-5
    assert far(ours, view(torch.cat([TOKENS, NEW], 1)).logits[:, -5:]) <= 1e-5


def test_padded_continuation_with_mask_and_positions_equals_transformers(view, hf):
    before = LEFT.sum(1, keepdim=True)
    at, full = before + torch.arange(5), torch.cat([LEFT, torch.ones_like(NEW)], 1)
    first = (LEFT.cumsum(1) - 1).clamp(min=0)
    caches = [
        m(PADDED, attention_mask=LEFT, position_ids=first, use_cache=True).past_key_values
        for m in (view, hf)
    ]
    ours, theirs = (
        m(NEW, attention_mask=full, position_ids=at, past_key_values=c).logits
        for m, c in zip((view, hf), caches, strict=True)
    )
    assert far(ours, theirs) <= 1e-5


@pytest.mark.parametrize("mask", [LEFT, RIGHT])
def test_continuation_without_mask_and_positions_does_not_depend_on_padding(view, hf, mask):
    """Each row equals the row alone, unlike in transformers' own model."""
    alone = torch.cat(
        [
            continued(view, row[own.bool()][None], None, new[None])
            for row, own, new in zip(TOKENS, mask, NEW, strict=True)
        ]
    )
    if mask is LEFT:  # a window counts columns, padding between two texts included
        assert far(continued(view, TOKENS, mask, NEW), alone) <= 1e-5
        assert far(continued(hf, TOKENS, mask, NEW), alone) > 1e-2
    elif hf.config.model_type == "llama":
        assert far(continued(view, TOKENS, mask, NEW), alone) <= 1e-5


def test_stock_attention_counts_positions_from_the_mask(stock_gemma):
    view = as_hf(stock_gemma)
    with pytest.raises(ShlError, match="takes a model of load_model"):
        view(TOKENS, position_ids=2 * torch.arange(20)[None])
    cache = view(TOKENS).past_key_values
    hidden = torch.ones(3, 25, dtype=torch.long)
    hidden[:, 3:6] = 0
    with pytest.raises(ShlError, match="takes a model of load_model"):
        view(NEW, attention_mask=hidden, past_key_values=cache)


def test_position_ids_are_used(fast_view, originals):
    view, hf = fast_view, originals["tiny-gemma"]
    gaps = torch.arange(20)[None] * 2  # a rotation sees differences, so a shift would not show
    ours, theirs = (m(TOKENS, position_ids=gaps).logits for m in (view, hf))
    assert far(ours, theirs) <= 1e-5
    assert far(ours, view(TOKENS).logits) > 1e-2
    cache = view(TOKENS, position_ids=gaps).past_key_values
    counted = view(NEW, past_key_values=cache).logits
    cache = hf(TOKENS, position_ids=gaps).past_key_values
    at = 39 + torch.arange(5)[None]
    assert far(counted, hf(NEW, position_ids=at, past_key_values=cache).logits) <= 1e-5


def test_masking_cached_tokens_later_does_not_change_positions(fast_view, originals):
    view, hf = fast_view, originals["tiny-gemma"]
    hidden = torch.ones(3, 25, dtype=torch.long)
    hidden[:, 3:6] = 0
    logits = []
    for m in (view, hf):
        cache = m(TOKENS, use_cache=True).past_key_values
        # One column more than there are tokens: transformers drops it.
        wide = torch.cat([hidden, torch.ones_like(hidden[:, :1])], 1)
        logits.append(m(NEW, attention_mask=wide, past_key_values=cache).logits)
    assert far(*logits) <= 1e-5
    assert far(logits[0], continued(view, TOKENS, None, NEW)) > 1e-3


def test_greedy_sequences_scores_and_suppressed_tokens(view, hf):
    arguments = {
        "attention_mask": LEFT,
        "output_scores": True,
        "output_logits": True,
        "return_dict_in_generate": True,
        **GREEDY,
    }
    plain, theirs = (m.generate(PADDED, **arguments) for m in (view, hf))
    assert torch.equal(plain.sequences, theirs.sequences)
    scores = [torch.stack(out.scores)[:, :, 2:] for out in (plain, theirs)]
    assert float((scores[0] - scores[1]).abs().max()) <= 1e-5
    assert float((torch.stack(plain.logits) - torch.stack(theirs.logits)).abs().max()) <= 1e-5
    banned = plain.sequences[:, 20].tolist()
    ours, theirs = (m.generate(PADDED, suppress_tokens=banned, **arguments) for m in (view, hf))
    assert torch.equal(ours.sequences, theirs.sequences)
    assert not set(banned) & set(ours.sequences[:, 20:].flatten().tolist())
    assert ours.past_key_values.get_seq_length() == 29  # the last token is not run


def test_sampling_several_sequences_and_generation_without_cache(view, hf):
    length = {"max_new_tokens": 6, "min_new_tokens": 6, "num_return_sequences": 3}
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, **length}
    outs = []
    for m in (view, hf):
        torch.manual_seed(3)
        outs.append(m.generate(PADDED, attention_mask=LEFT, **sampling))
    assert torch.equal(*outs)
    assert outs[0].shape == (9, 26)
    greedy = {"attention_mask": LEFT, **GREEDY}
    assert torch.equal(
        view.generate(PADDED, use_cache=False, **greedy), view.generate(PADDED, **greedy)
    )


def test_beams_and_processors(view, hf):
    def even(ids, scores):
        return scores.masked_fill(torch.arange(104) % 2 == 1, -torch.inf)

    arguments = {
        "attention_mask": LEFT,
        "num_beams": 4,
        "num_return_sequences": 2,
        "logits_processor": LogitsProcessorList([even]),
        "output_scores": True,
        "return_dict_in_generate": True,
        **GREEDY,
    }
    ours, theirs = (m.generate(PADDED, **arguments) for m in (view, hf))
    assert torch.equal(ours.sequences, theirs.sequences)
    assert float((ours.sequences_scores - theirs.sequences_scores).abs().max()) <= 1e-5
    # The beams were reordered, so the cache was too.
    indices = ours.beam_indices[:, :10]
    assert bool((indices != indices[:, :1]).any())


def test_assistant_model_and_continued_cache(view, hf):
    row = TOKENS[:1]
    plain = hf.generate(row, **GREEDY)
    assert torch.equal(view.generate(row, assistant_model=view, **GREEDY), plain)
    cache = view(row).past_key_values
    cut = copy.deepcopy(cache)
    view(NEW[:1], past_key_values=cut)
    cut.crop(-5)
    for kept in (cache, cut):
        longer = torch.cat([row, NEW[:1]], 1)
        assert torch.equal(
            view.generate(longer, past_key_values=kept, **GREEDY), hf.generate(longer, **GREEDY)
        )


def test_rows_of_a_cache_can_be_repeated_and_selected(view):
    cache = view(PADDED, attention_mask=LEFT).past_key_values
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([4, 0]))
    chosen = view(NEW[:2], past_key_values=cache).logits
    expected = continued(view, PADDED[[2, 0]], LEFT[[2, 0]], NEW[:2])
    assert far(chosen, expected) <= 1e-5
    assert (cache.batch_size, cache.get_seq_length()) == (2, 25)
    assert len(cache) == view.hooked.cfg.n_layers


def test_active_hooks_apply(model, view, hf, vector):
    arguments = {"attention_mask": LEFT, **GREEDY}
    base = view.generate(PADDED, **arguments)
    layer = hf.model.layers[1]
    theirs = layer.register_forward_hook(lambda m, a, out: out + 0.75 * V)
    try:
        expected, logits = hf.generate(PADDED, **arguments), hf(TOKENS).logits
    finally:
        theirs.remove()
    with vector.steering(model, dose=0.75):
        assert torch.equal(view.generate(PADDED, **arguments), expected)
        assert far(view(TOKENS).logits, logits) <= 1e-5
        with suspended(model):
            assert torch.equal(view.generate(PADDED, **arguments), base)
    assert not torch.equal(expected, base)
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", lambda h, hook: h + 0.75 * V)]):
        assert torch.equal(view.generate(PADDED, **arguments), expected)
    adapter = random_adapter(model)
    expected = merged(model, adapter)(TOKENS)
    with baked(model, [adapter]):
        assert far(view(TOKENS).logits, expected) <= 1e-4
    assert torch.equal(view.generate(PADDED, **arguments), base)
    assert hook_count(model) == 0


def test_generate_declares_prompt_lengths_to_hooks(model, view, vector):
    """A dose that halves from the assistant tag on equals doses computed by hand."""
    output = {"output_logits": True, "return_dict_in_generate": True}
    with vector.steering(model, dose=2.0, half_life=2.0):
        out = view.generate(PADDED, attention_mask=LEFT, **output, **GREEDY)
    row = out.sequences[0, 7:]  # 13 prompt tokens, 10 new ones
    doses = torch.tensor([2.0] * 13 + [2.0 * 0.5 ** (n / 2) for n in range(1, 10)])
    own = [("blocks.1.hook_resid_post", lambda h, hook: h + doses[:, None] * V)]
    expected = model.run_with_hooks(row[None, :-1], fwd_hooks=own)[0, 12:]
    assert float((torch.stack(out.logits)[:, 0] - expected).abs().max()) <= 1e-4


def test_gradients_equal_those_of_the_model(model, view):
    def grad(run):
        push = torch.zeros(32, requires_grad=True)
        hook = ("blocks.0.hook_resid_pre", lambda h, hook: h + push)
        with torch.enable_grad(), model.hooks(fwd_hooks=[hook]):
            run().log_softmax(-1)[:, :, 7].sum().backward()
        return push.grad

    ours, theirs = grad(lambda: view(TOKENS).logits), grad(lambda: model(TOKENS))
    assert theirs.abs().max() > 0.1
    assert float((ours - theirs).abs().max() / theirs.abs().max()) <= 1e-4


def test_view_is_a_transformers_model_that_shares_its_parameters(model, view):
    assert isinstance(view, PreTrainedModel)
    assert isinstance(view, GenerationMixin)
    assert view.can_generate()
    own = {id(p) for p in model.parameters()}
    assert {id(p) for p in view.parameters()} == own
    assert (view.device, view.dtype) == (model.W_U.device, torch.float32)
    assert view.config.vocab_size == 104
    assert view.config.max_position_embeddings == model.cfg.n_ctx
    assert (view.generation_config.eos_token_id, view.generation_config.pad_token_id) == (1, 0)
    assert view.eval() is view.to("cpu") is view
    assert not view.training
    assert view.to(torch.float32).dtype == torch.float32
    del view
    gc.collect()
    assert hook_count(model) == 0


WRONG = {
    "embeds": ({"inputs_embeds": torch.zeros(1, 2, 32)}, "inputs_embeds is not supported"),
    "attentions": ({"output_attentions": True}, "output_attentions is not supported"),
    "cache": ({"past_key_values": DynamicCache()}, "is a DynamicCache, it must be what"),
    "mask 4d": ({"attention_mask": torch.ones(3, 1, 20, 20)}, r"\(3, 1, 20, 20\), it must be"),
    "mask short": ({"attention_mask": LEFT[:, 1:]}, r"\(3, 19\), it must be"),
    "mask wide": (
        {"attention_mask": torch.cat([LEFT, 0 * LEFT], 1)},
        "zeros after column 20, the number of tokens",
    ),
    "mask values": ({"attention_mask": 2 * LEFT}, "values from 0 to 2, they must be 0 or 1"),
    "positions": ({"position_ids": torch.arange(19)[None]}, r"\(1, 19\), it must be that of"),
    "negative": ({"position_ids": torch.arange(20)[None] - 1}, "has position -1"),
    "far": ({"position_ids": torch.arange(20)[None] + 500}, "position 519, the context has 0 to"),
    "labels": ({"labels": TOKENS, "logits_to_keep": 1}, "labels need the logits of all"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG.keys())
def test_unsupported_arguments_are_rejected(gemma, arguments, message):
    with pytest.raises(ShlError, match=message) as error:
        as_hf(gemma)(TOKENS, **arguments)
    one_sentence(error)


def test_invalid_inputs_are_rejected(gemma, llama, tmp_path):
    view = as_hf(gemma)
    other = as_hf(llama)(TOKENS).past_key_values
    cache = view(TOKENS).past_key_values
    invalid = {
        r"input_ids has shape \(20,\)": lambda: view(TOKENS[0]),
        "input_ids has shape None": lambda: view(),
        "belongs to another model": lambda: view(NEW, past_key_values=other),
        "the cache holds 3 rows, input_ids has 2": lambda: view(NEW[:2], past_key_values=cache),
        r"crop\(4\) of 20 positions": lambda: cache.crop(4),
        "not layer by layer": lambda: cache.update(None, None, 0),
        "load the model with the device and dtype": lambda: view.to(torch.bfloat16),
        "cannot be saved": lambda: view.save_pretrained(tmp_path),
        "cache_implementation is 'static'": lambda: view.generate(
            TOKENS, cache_implementation="static", **GREEDY
        ),
        "is model.W_E, not a module": lambda: view.get_input_embeddings(),
    }
    for message, call in invalid.items():
        with pytest.raises(ShlError, match=message) as error:
            call()
        one_sentence(error)
    with pytest.raises(TypeError, match="token_type_ids"):
        view(TOKENS, token_type_ids=0 * TOKENS)
    assert HookedCache(gemma).batch_size == 0
