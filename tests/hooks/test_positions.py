"""Positions, masks, decay and gates act on exactly their tokens, in batches and with a cache."""

from dataclasses import replace

import pytest
import torch
from helpers import hook_count, one_sentence, random_adapter, tokens_of

from shl.fast import KVCache
from shl.hooks.bake import baked
from shl.hooks.handle import running, suspended
from shl.hooks.recorder import Recorder
from shl.hooks.vector import SteeringVector
from shl.measure.vignettes import evaluate
from shl.models.activations import activations
from shl.models.generate import generate, prefill
from shl.models.scores import completion_hidden, token_nll
from shl.models.tiny import tiny_gemma
from shl.models.tokens import Prompt, encode, pad_left
from shl.utils.errors import ShlError

TOKENS = tokens_of(3, 20)
PROMPTS = ["Tell me about your long and quiet day?", "Hi?", "Why is that so?", "A b?"]
MASK = torch.zeros(4, 60, dtype=torch.bool)
MASK[0, 5:44] = MASK[1, ::2] = MASK[2, 14:50] = True
OPTIONS = {
    "gate": {"gate": "cosine"},
    "decay": {"half_life": 3.0},
    "positions": {"positions": slice(12, 50, 2)},
    "mask": {"mask": MASK},
    "all": {"gate": "cosine", "half_life": 5.0, "mask": MASK, "positions": slice(3, None)},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.fixture
def vector(model):
    g = torch.Generator().manual_seed(0)
    directions = {layer: 2 * torch.randn(32, generator=g) for layer in (0, 1)}
    return SteeringVector(directions, model.cfg.model_name, "demo", 1)


def post(layer):
    return f"blocks.{layer}.hook_resid_post"


def rows_of(options, row):
    """The options for one row of the batch alone."""
    mask = options.get("mask")
    return options if mask is None else options | {"mask": mask[row : row + 1]}


def greedy(model, prompts, n=14):
    return [c.tokens for c in generate(model, prompts, temperature=0.0, max_new_tokens=n)]


def sampled(model):
    return [c.tokens for c in generate(model, PROMPTS, max_new_tokens=30, min_new_tokens=30)]


def residuals(model, tokens, **options):
    """Layer 1's residual as it arrives at our hook, and as it leaves."""
    before = []
    with model.hooks(fwd_hooks=[(post(1), lambda h, hook: before.append(h.clone()))]):
        handle = SteeringVector({1: options.pop("v")}, "tiny", "demo", 1).steering(model, **options)
        with handle:
            _, cache = model.run_with_cache(tokens)
    return before[0], cache[post(1)], handle


@pytest.mark.parametrize("dose", [0.75, torch.tensor([0.5, 0.0, -1.0])])
@each_option
def test_h_plus_factor_v_exactly_at_the_site_and_no_change_before_it(model, vector, dose, options):
    v = vector.directions[1]
    options = options | ({"mask": MASK[:3]} if "mask" in options else {})
    with running(prompts=[8, 20, 3]):
        _, plain = model.run_with_cache(TOKENS)
        h, steered, handle = residuals(model, TOKENS, v=v, dose=dose, record=True, **options)
    (one,) = handle.factors[1]
    factor = one.factors[..., None]
    assert torch.equal(h, plain[post(1)])
    assert torch.equal(steered, h + factor * v)
    # By the definition, token by token.
    doses = dose if isinstance(dose, torch.Tensor) else torch.full((3,), dose)
    for row, prompt in enumerate((8, 20, 3)):
        for p in range(20):
            d = float(doses[row])
            if "half_life" in options:
                d *= 0.5 ** (max(0, p - prompt + 1) / options["half_life"])
            if "mask" in options:
                d *= float(options["mask"][row, p])
            if "positions" in options:
                d *= p in range(60)[options["positions"]]
            if "gate" in options:
                x = h[row, p].double()
                u = (1 if d >= 0 else -1) * v.double()
                d *= 1 - max(0.0, float(x @ u / (x.norm() * u.norm())))
            assert float(factor[row, p]) == pytest.approx(d, abs=1e-5)


@each_option
def test_every_option_changes_the_text_and_the_residual(model, vector, options):
    with vector.steering(model, 0.5):
        plain, kept = sampled(model), activations(model, PROMPTS, [post(2)])[post(2)]
    with vector.steering(model, 0.5, **options):
        assert sampled(model) != plain
        if options.keys() != {"half_life"}:  # a prompt has the full dose
            moved = activations(model, PROMPTS, [post(2)])[post(2)] - kept
            assert moved.abs().max() > 1e-3


@each_option
def test_batches_equal_single_rows_and_the_cache_equals_whole_forwards(model, vector, options):
    with vector.steering(model, 1.0, record=True, **options) as handle:
        batched = generate(model, PROMPTS, temperature=0.0, max_new_tokens=14, batch_size=3)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, batched, strict=True)):
        own = rows_of(options, row)
        with vector.steering(model, 1.0, record=True, **own) as alone:
            (single,) = generate(model, [prompt], temperature=0.0, max_new_tokens=14)
            assert single.tokens == completion.tokens
        # The last token is chosen and never run.
        ids = [*completion.prompt_tokens, *completion.tokens][: len(alone.applied(1))]
        with (
            vector.steering(model, 1.0, record=True, **own) as whole,
            running(prompts=[len(completion.prompt_tokens)]),
        ):
            logits = model(torch.tensor([ids]))[0]
        for layer in (0, 1):
            expected = whole.applied(layer)
            assert torch.allclose(alone.applied(layer), expected, atol=1e-4)
            assert torch.allclose(handle.applied(layer, row), expected, atol=1e-4)
            assert len(expected) >= len(completion.prompt_tokens)
        answered = logits[len(completion.prompt_tokens) - 1 :].argmax(-1).tolist()
        n = min(len(answered), len(completion.tokens))
        assert answered[:n] == list(completion.tokens[:n])


@each_option
def test_scores_of_a_completion_see_the_factors_of_its_generation(model, vector, options):
    with vector.steering(model, 1.0, record=True, **options) as generated:
        completions = generate(model, PROMPTS, max_new_tokens=10, min_new_tokens=10)
    with vector.steering(model, 1.0, record=True, **options) as scored:
        token_nll(model, completions, batch_size=3)
    for row, completion in enumerate(completions):
        n = len(completion.prompt_tokens) + 9
        assert torch.allclose(scored.applied(1, row)[:n], generated.applied(1, row)[:n], atol=1e-4)


def test_rows_keep_their_decay_and_mask_as_the_batch_shrinks():
    model = tiny_gemma()
    model.unembed.b_U.data[1] = 2.5  # the end comes now and then
    v = SteeringVector({1: 2 * torch.linspace(-1, 1, 32)}, "tiny", "demo", 1)
    mask = torch.rand(4, 70, generator=torch.Generator().manual_seed(0)) < 0.7
    for options in ({"half_life": 4.0}, {"mask": mask, "half_life": 9.0}):
        settings = {"max_new_tokens": 24, "seed": 5}
        with v.steering(model, 1.0, record=True, **options) as handle:
            completions = generate(model, PROMPTS, **settings)
        assert len({len(c.tokens) for c in completions}) > 2
        for row, c in enumerate(completions):
            with v.steering(model, 1.0, record=True, **rows_of(options, row)) as whole:
                completion_hidden(model, [c])
            ran = handle.applied(1, row)
            assert torch.allclose(ran, whole.applied(1)[: len(ran)], atol=1e-6)


def test_decay_continues_through_a_long_completion(llama):
    v = SteeringVector({1: torch.ones(32)}, "tiny", "demo", 1)
    with v.steering(llama, 2.0, half_life=4.0, record=True) as handle:
        (c,) = generate(llama, ["Hi?"], max_new_tokens=9, min_new_tokens=9)
    got = handle.applied(1)
    n = len(c.prompt_tokens)
    assert torch.equal(got[:n], torch.full((n,), 2.0))
    # The eight tokens that are run after the tag: 2 * 2 ** (-j / 4)
    assert got[n:].tolist() == pytest.approx([2 * 2 ** (-j / 4) for j in range(1, 9)])


def test_shared_prefix_is_steered_per_row(llama):
    prompts = [Prompt(text, "You are someone who sails.") for text in ("Hi?", "And you?", "z")]
    v = SteeringVector({0: 2 * torch.ones(32)}, "tiny-llama", "demo", 1)
    mask = torch.zeros(3, 80, dtype=torch.bool)
    mask[0, 3:20] = mask[1, 15:] = True
    for options in ({"mask": mask}, {"positions": range(4, 40)}, {"half_life": 2.0}):
        with v.steering(llama, 1.0, **options):
            batched = greedy(llama, prompts)
        for row, prompt in enumerate(prompts):
            with v.steering(llama, 1.0, **rows_of(options, row)):
                assert greedy(llama, [prompt]) == [batched[row]]


def test_prefix_is_shared_unless_rows_may_differ(llama):
    rows = [[*tokens_of(20, seed=3).tolist(), 5 + i] for i in range(3)]
    v = SteeringVector({0: torch.ones(32)}, "tiny-llama", "demo", 1)
    widths = []
    with Recorder(llama, ["blocks.0.hook_resid_post"]) as recorder:
        for options in ({"positions": [3]}, {"gate": "cosine"}, {"half_life": 1.0}):
            with v.steering(llama, 1.0, **options):
                prefill(llama, rows)
            seen = recorder.seen["blocks.0.hook_resid_post"]
            widths.append([tuple(x.shape[:2]) for x in seen])
            seen.clear()
    assert widths == [[(1, 20), (3, 1)], [(1, 20), (3, 1)], [(3, 21)]]


def test_tokens_beyond_the_mask_are_not_steered(gemma):
    v = SteeringVector({1: 3 * torch.ones(32)}, "tiny", "demo", 1)
    n = len(encode(gemma, "Hi?"))
    narrow = torch.ones(1, n - 1, dtype=torch.bool)
    with v.steering(gemma, 1.0, mask=narrow, record=True) as handle:
        generate(gemma, ["Hi?"], max_new_tokens=4, min_new_tokens=4)
    assert handle.applied(1).tolist() == [1.0] * (n - 1) + [0.0] * 4


def test_mask_with_wrong_number_of_rows_is_rejected(gemma):
    v = SteeringVector({1: torch.ones(32)}, "tiny", "demo", 1)
    mask = torch.ones(5, 9, dtype=torch.bool)
    with v.steering(gemma, 1.0, mask=mask), pytest.raises(ShlError) as error:
        generate(gemma, PROMPTS)
    assert "a hook has doses or a mask for 5 rows, there are 4 prompts" in one_sentence(error)
    with v.steering(gemma, 1.0, mask=mask), pytest.raises(ShlError) as error:
        gemma(TOKENS)
    assert "5 rows of a mask were given for a batch of 3 rows" in one_sentence(error)


def test_probe_rejects_per_row_doses_and_masks(gemma):
    v = SteeringVector({1: torch.ones(32)}, "tiny", "demo", 1)
    for options in ({"dose": torch.ones(8)}, {"mask": torch.ones(8, 9, dtype=torch.bool)}):
        with v.steering(gemma, **options), pytest.raises(ShlError, match="for 8 rows, the probe"):
            evaluate(gemma)


def test_unknown_gate_is_rejected(gemma):
    v = SteeringVector({1: torch.ones(32)}, "tiny", "demo", 1)
    for gate in ("sine", "", True):
        with pytest.raises((ShlError, TypeError), match="gate"):
            v.steering(gemma, 1.0, gate=gate)
    assert hook_count(gemma) == 0


def test_suspended_and_reset_hooks_with_positions_and_gate(gemma):
    v = SteeringVector({1: torch.ones(32)}, "tiny", "demo", 1)
    plain = gemma(TOKENS)
    with v.steering(gemma, 1.0, positions=[0, 4], gate="cosine"):
        steered = gemma(TOKENS)
        assert not torch.equal(steered, plain)
        gemma.reset_hooks(including_permanent=True)
        assert torch.equal(gemma(TOKENS), steered)
        with suspended(gemma):
            assert torch.equal(gemma(TOKENS), plain)
    assert torch.equal(gemma(TOKENS), plain)


def test_recording_is_opt_in_and_changes_nothing(model, vector):
    with vector.steering(model, 0.7) as handle:
        expected = model(TOKENS)
    assert handle.factors == {0: [], 1: []}
    with pytest.raises(ShlError, match="nothing was recorded of row 0 at layer 1"):
        handle.applied(1)
    with vector.steering(model, 0.7, record=True) as handle:
        assert torch.equal(model(TOKENS), expected)
        model(TOKENS[:, :4])
    assert [x.factors.shape for x in handle.factors[1]] == [(3, 20), (3, 4)]
    assert torch.equal(handle.applied(1, row=2), torch.full((20,), 0.7))
    with pytest.raises(ShlError, match="layer 5 is not steered"):
        handle.applied(5)


# Adapters take the same doses, masks and positions.


def test_adapter_acts_on_selected_tokens_only(model):
    adapter = random_adapter(model, ("q", "v", "o", "gate", "down", "resid"), (1,))
    with adapter.attach(model):
        full = model.run_with_cache(TOKENS)[1][post(1)]
    base = model.run_with_cache(TOKENS)[1][post(1)]
    with adapter.attach(model, positions=slice(9, None)):
        got = model.run_with_cache(TOKENS)[1][post(1)]
    # No change before token 9; after it the keys and values of tokens 0 to 8 are still base's.
    assert torch.equal(got[:, :9], base[:, :9])
    assert (got[:, 9:] - base[:, 9:]).abs().max() > 0.05
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[1] = False
    for make in (adapter.attach, lambda m, **o: baked(m, [adapter], **o)):
        with make(model, mask=mask):
            got = model.run_with_cache(TOKENS)[1][post(1)]
        assert torch.equal(got[1], base[1])
        assert (got[[0, 2]] - full[[0, 2]]).abs().max() <= 1e-5


def test_dose_scales_the_adapters_update(model):
    adapter = random_adapter(model, ("k", "up", "resid"), (0, 2))
    doses = torch.tensor([0.5, 0.0, -1.0])
    with adapter.attach(model, dose=doses):
        got = model(TOKENS)
    for row, dose in enumerate(doses.tolist()):
        by_hand = replace(adapter, scale=adapter.scale * dose)
        with by_hand.attach(model):
            expected = model(TOKENS)[row]
        assert (got[row] - expected).abs().max() <= 1e-5
        with adapter.attach(model, dose=dose):
            assert (model(TOKENS)[row] - expected).abs().max() <= 1e-5


def test_dose_1_changes_no_bit(model):
    adapter = random_adapter(model)
    with baked(model, [adapter]):
        expected = model(TOKENS)
    for dose in (1, 1.0):
        with baked(model, [adapter], dose=dose):
            assert torch.equal(model(TOKENS), expected)


def test_adapter_doses_stay_with_their_prompts_in_generate(llama):
    adapter = random_adapter(llama, size=0.4)
    doses = torch.tensor([1.0, 0.0, -1.0, 0.5])
    with baked(llama, [adapter], dose=doses, positions=slice(4, None)):
        batched = generate(llama, PROMPTS, temperature=0.0, max_new_tokens=10, batch_size=3)
    for i, prompt in enumerate(PROMPTS):
        with baked(llama, [adapter], dose=doses[i : i + 1], positions=slice(4, None)):
            assert greedy(llama, [prompt], 10) == [batched[i].tokens]
    assert batched[1].tokens == greedy(llama, [PROMPTS[1]], 10)[0]


def test_gradients_with_positions(gemma):
    adapter = random_adapter(gemma, ("q", "down"), (1,))
    up = adapter.up["blocks.1.down"].requires_grad_(True)
    with adapter.attach(gemma, positions=[3]):
        gemma(TOKENS).square().mean().backward()
    assert up.grad.abs().max() > 0
    up.requires_grad_(False)


def test_dose_or_positions_with_materialise_or_stacked_residual_adapters_are_rejected(gemma):
    one = random_adapter(gemma, ("q", "resid"), (1,))
    for options in ({"dose": 0.5}, {"dose": torch.ones(3)}, {"positions": [1]}):
        with pytest.raises(ShlError, match="weights act on every token alike"):
            baked(gemma, [random_adapter(gemma)], materialise=True, **options)
        with pytest.raises(ShlError, match=r"blocks\.1\.resid.*attach them one by one"):
            baked(gemma, [one, one], **options)
    with baked(gemma, [one], dose=0.5), baked(gemma, [one, one]):
        pass


# Recorders and activations use the same positions.


def test_recorder_stores_the_selected_tokens(model):
    name = "blocks.1.attn.hook_z"
    mask = torch.zeros(4, 60, dtype=torch.bool)
    mask[0, 7] = mask[2, 14] = mask[2, 18] = True
    for options, expected in (
        ({"mask": mask}, [(0, 7), (2, 14), (2, 18)]),
        ({"positions": [6, 17]}, [(i, p) for i in range(4) for p in (6, 17)]),
    ):
        with Recorder(model, [name], **options) as recorder:
            completions = generate(model, PROMPTS, max_new_tokens=9, min_new_tokens=9)
        x = torch.cat(recorder.seen[name])
        where = torch.cat(recorder.where[name]).tolist()
        ran = {i: len(c.prompt_tokens) + 8 for i, c in enumerate(completions)}
        assert sorted(map(tuple, where)) == [(i, p) for i, p in expected if p < ran[i]]
        for got, (row, at) in zip(x, where, strict=True):
            c = completions[row]
            ids = torch.tensor([[*c.prompt_tokens, *c.tokens]])
            assert (got - model.run_with_cache(ids)[1][name][0, at]).abs().max() <= 1e-4


def test_recorder_with_positions_rejects_hooks_without_positions(gemma):
    with pytest.raises(ShlError, match="'hook_embed' is outside the blocks"):
        Recorder(gemma, ["hook_embed"], positions=[1])
    name = "blocks.0.attn.hook_pattern"
    with (
        Recorder(gemma, [name], positions=[1]),
        pytest.raises(ShlError, match="must be batch and position"),
    ):
        gemma(TOKENS)


def test_activations_in_batches_keep_doses_with_their_prompts(model, vector):
    doses = torch.tensor([2.0, -1.0, 0.0, 1.0])
    with vector.steering(model, doses):
        got = activations(model, PROMPTS, [post(2)], batch_size=2)[post(2)]
    for i, prompt in enumerate(PROMPTS):
        with vector.steering(model, float(doses[i])):
            alone = activations(model, [prompt], [post(2)])[post(2)][0]
        assert (got[i] - alone).abs().max() <= 1e-4


def test_scores_keep_doses_with_their_completions(model, vector):
    completions = generate(model, PROMPTS, max_new_tokens=6, min_new_tokens=6)
    doses = torch.tensor([2.0, -1.0, 0.0, 1.0])
    with vector.steering(model, doses):
        got = token_nll(model, completions)
    for i, completion in enumerate(completions):
        with vector.steering(model, float(doses[i])):
            assert torch.allclose(got[i], token_nll(model, [completion])[0], atol=1e-4)


def test_cached_forwards_outside_generate_equal_the_whole(model, vector):
    options = {"positions": [2, 7, 13], "gate": "cosine"}
    with vector.steering(model, 1.0, **options):
        whole = model(TOKENS)
        cache = KVCache.empty(model, 3)
        parts = [model(x, past_kv_cache=cache) for x in TOKENS.split([6, 1, 1, 12], 1)]
    assert (torch.cat(parts, 1) - whole).abs().max() <= 1e-4


def test_completion_hidden_declares_prompt_lengths(gemma):
    (c,) = generate(gemma, ["Hi?"], max_new_tokens=6, min_new_tokens=6)
    v = SteeringVector({1: torch.ones(32)}, "tiny", "demo", 1)
    with v.steering(gemma, 1.0, half_life=1.0, record=True) as handle:
        completion_hidden(gemma, [c])
    n = len(c.prompt_tokens)
    assert handle.applied(1)[n - 1 :].tolist() == [0.5**j for j in range(7)]


def test_doses_per_token_follow_positions_of_rows_in_any_batch(model, vector):
    doses = torch.linspace(-1.0, 2.0, 3 * 12).view(3, 12)
    rows = [TOKENS[i, : 9 + 4 * i].tolist() for i in range(3)]
    padded, mask = pad_left(model, rows)
    last = model.cfg.n_layers
    with vector.steering(model, doses, record=True) as steering:
        batched = model(padded, attention_mask=mask, stop_at_layer=last)
    for i, row in enumerate(rows):
        # Tokens beyond the last dose have that dose.
        expected = [float(doses[i, min(p, 11)]) for p in range(len(row))]
        assert steering.applied(1, i).tolist() == pytest.approx(expected)
        with vector.steering(model, doses[i : i + 1]):
            alone = model(torch.tensor([row]), stop_at_layer=last)
        assert (batched[i, -len(row) :] - alone[0]).abs().max() <= 1e-4
    constant = torch.full((3, 12), 0.7)
    with vector.steering(model, constant), running(rows=[2, 0, 1]):
        by_token = model(TOKENS, stop_at_layer=last)
    with vector.steering(model, 0.7):
        assert torch.equal(by_token, model(TOKENS, stop_at_layer=last))


def test_a_dose_is_replaced_inside_a_body_only(model, vector):
    hooks = hook_count(model)
    with vector.steering(model, 0.5) as steering:
        before, count = model(TOKENS), hook_count(model)
        for doses in (torch.tensor([0.5, 1.0, -1.0]), torch.rand(3, 20)):
            with vector.steering(model, doses), suspended(model, steering):
                expected = model(TOKENS)
            with steering.dosed(doses):
                assert steering.rows == 3
                assert torch.equal(model(TOKENS), expected)
            assert (steering.dose, steering.rows, steering.per_row) == (0.5, None, False)
            assert hook_count(model) == count
            assert torch.equal(model(TOKENS), before)
        table = torch.zeros(3)
        with steering.dosed(table):
            off = model(TOKENS)
            table += 0.5
            assert torch.equal(model(TOKENS), before)
        with suspended(model):
            assert torch.allclose(off, model(TOKENS), atol=1e-6)
    assert hook_count(model) == hooks
