"""While a batch decodes, adapters in the products of the weights do what their hooks do."""

import gc
import weakref
from contextlib import contextmanager

import pytest
import torch
from helpers import hook_count, merged, one_sentence, random_adapter, stock, tokens_of
from transformer_lens import TransformerLensKeyValueCache

from shl.config import LINEAR_SITES, SITE_KINDS
from shl.fast.fused_lora import Joint
from shl.fast.kv_cache import KeyValues
from shl.fast.linear import FEW
from shl.hooks.bake import baked
from shl.hooks.handle import decoding, handles_on, running, suspended
from shl.models.generate import LONG, generate
from shl.models.tokens import Prompt
from shl.utils.errors import ShlError

TOKENS = tokens_of(3, 9)
SITES = [*((kind,) for kind in SITE_KINDS), ("q", "v"), ("k", "up"), LINEAR_SITES, SITE_KINDS]


def three(model, sites=LINEAR_SITES):
    """Rounds of different rank, scale and layers."""
    layers = [(0, 1, 2), (0, 2), (1,)]
    return [
        random_adapter(model, sites, layers[i], seed=i, alpha=2.0 + i, rank=2 * i + 1, size=0.12)
        for i in range(3)
    ]


def ragged(model):
    """Adapters whose stack has another rank at each of q, k and v, and at gate and up."""
    return [
        random_adapter(model, ["q", "k", "gate"], (1,), seed=0, rank=2),
        random_adapter(model, ["q", "v", "up", "gate"], (1,), seed=1, rank=3),
    ]


def step_by_step(model, tokens=TOKENS, rows=None, body=decoding):
    """Logits `[batch, pos, vocab]`: four tokens at once, the others one by one."""
    cache = KeyValues.empty(model, len(tokens))
    out = []
    with torch.no_grad(), running(rows=rows or range(len(tokens)), prompts=[4] * len(tokens)):
        out.append(model(tokens[:, :4], past_kv_cache=cache))
        with body(model, len(tokens)):
            out += [model(tokens[:, i : i + 1], past_kv_cache=cache) for i in range(4, 9)]
    return torch.cat(out, 1)


@contextmanager
def hooks_only(model, rows):
    yield


@contextmanager
def counted(monkeypatch):
    """Which sites' products have been taken over, in order."""
    kinds, real = [], Joint.output

    def output(self, kind, *args):
        kinds.append(kind)
        return real(self, kind, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Joint, "output", output)
        yield kinds


@pytest.mark.parametrize("sites", SITES)
def test_the_products_give_what_the_hooks_give(model, sites):
    base = step_by_step(model)
    with baked(model, three(model, sites), joint=False):
        expected = step_by_step(model)
    with baked(model, three(model, sites)):
        got = step_by_step(model)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert float((expected - base)[:, 4:].abs().max()) > 0.05


def test_the_products_give_what_merged_weights_give(model):
    adapters = three(model)
    other = model
    for adapter in adapters:
        other = merged(other, adapter)
    with torch.no_grad():
        expected = other(TOKENS)
    with baked(model, adapters):
        torch.testing.assert_close(step_by_step(model), expected, rtol=1e-4, atol=1e-4)


def test_ranks_may_differ_between_sites_of_one_product(model):
    with baked(model, ragged(model)) as handle:
        assert {len(a) for a in handle.stacked.down.values()} == {2, 3, 5}
        got = step_by_step(model)
        expected = step_by_step(model, body=hooks_only)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_biases_are_kept(gemma):
    names = [
        (block.attn if name in block.attn._parameters else block.mlp)._parameters[name]
        for block in gemma.blocks
        for name in ("b_Q", "_b_K", "_b_V", "b_O", "b_in", "b_out")
    ]
    with baked(gemma, three(gemma)):
        without = step_by_step(gemma)
        try:
            for i, bias in enumerate(names):
                bias.data += 0.1 * torch.randn(
                    bias.shape, generator=torch.Generator().manual_seed(i)
                )
            got = step_by_step(gemma)
            expected = step_by_step(gemma, body=hooks_only)
        finally:
            for bias in names:
                bias.data.zero_()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert float((got - without).abs().max()) > 0.05


@pytest.mark.parametrize(
    "scope",
    [
        {"dose": torch.tensor([0.0, 0.5, 2.0])},
        {"dose": -0.7},
        {"positions": [0, 5, 7]},
        {"mask": torch.arange(27).view(3, 9) % 4 < 2},
        {"dose": torch.tensor([1.0, 0.5, 2.0]), "positions": slice(6, None)},
    ],
)
def test_doses_masks_and_positions_count(model, scope):
    with baked(model, three(model)[:1]):
        plain = step_by_step(model)
    with baked(model, three(model)[:1], **scope):
        got = step_by_step(model)
        expected = step_by_step(model, body=hooks_only)
        swapped = step_by_step(model, TOKENS[[2, 0, 1]], rows=[2, 0, 1])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(swapped, got[[2, 0, 1]], rtol=1e-5, atol=1e-5)
    assert float((got - plain).abs().max()) > 0.01


def test_no_hook_is_left_on_while_decoding_and_all_come_back(model, monkeypatch):
    with baked(model, three(model)) as handle, counted(monkeypatch) as kinds:
        with torch.no_grad():
            before, placed = model(TOKENS), hook_count(model)
            with decoding(model, 3):
                assert hook_count(model) == 0
                assert handles_on(model) == (handle,)
                model(TOKENS)
            assert kinds == list(LINEAR_SITES) * 3
            assert hook_count(model) == placed > 0
            assert torch.equal(model(TOKENS), before)
        assert len(kinds) == 7 * 3


def test_hooks_come_back_before_those_placed_meanwhile(model):
    seen = []
    with baked(model, three(model, ["q"])), torch.no_grad():
        point = model.blocks[0].attn.hook_q
        with decoding(model, 3):
            late = point.register_forward_hook(lambda m, a, y: seen.append(y.clone()))
        try:
            model(TOKENS)
        finally:
            late.remove()
    with torch.no_grad(), baked(model, three(model, ["q"])):
        late = point.register_forward_hook(lambda m, a, y: seen.append(y.clone()))
        try:
            model(TOKENS)
        finally:
            late.remove()
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("early", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    "name", ["attn.hook_q", "attn.hook_v", "attn.hook_z", "mlp.hook_pre", "mlp.hook_post"]
)
def test_who_watches_a_site_sees_and_changes_what_the_hooks_let_them(model, name, early):
    def run(joint):
        seen = []

        def change(x, hook):
            seen.append(x.clone())
            return 1.5 * x

        point = model.hook_dict[f"blocks.1.{name}"]
        if early:
            point.add_hook(change)
            bake = baked(model, three(model), joint=joint)
        else:
            bake = baked(model, three(model), joint=joint)
            point.add_hook(change)
        try:
            with bake:
                return [step_by_step(model), *seen]
        finally:
            model.reset_hooks()

    for got, expected in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_whoever_changes_an_input_keeps_the_hooks(model, monkeypatch):
    def louder(module, args, kwargs):
        return args, {**kwargs, "query_input": 2 * kwargs["query_input"]}

    with baked(model, three(model)), counted(monkeypatch) as kinds:
        on = model.blocks[0].attn.register_forward_pre_hook(louder, with_kwargs=True)
        try:
            got, expected = step_by_step(model), step_by_step(model, body=hooks_only)
        finally:
            on.remove()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    # Five steps: in the first of three layers only the MLP has left its hooks.
    assert len(kinds) == 5 * (3 * 7 - 4)


def test_the_gate_closes_inside(model):
    with torch.no_grad():
        base = model(TOKENS)
        with baked(model, three(model)) as handle, decoding(model, 3):
            on = model(TOKENS)
            with suspended(model):
                assert handles_on(model) == ()
                assert torch.equal(model(TOKENS), base)
            assert handles_on(model) == (handle,)
            assert torch.equal(model(TOKENS), on)
            handle.remove()
            assert handles_on(model) == ()
            assert torch.equal(model(TOKENS), base)
    assert float((on - base).abs().max()) > 0.05


def test_an_edit_of_the_weights_counts_from_the_next_batch_on(model):
    weight = model.blocks[1].mlp.W_out
    kept = weight.data.clone()
    with baked(model, three(model)):
        first = step_by_step(model)
        try:
            weight.data.mul_(0.5)  # which torch's version counter does not see
            got = step_by_step(model)
            expected = step_by_step(model, body=hooks_only)
        finally:
            weight.data.copy_(kept)
        assert torch.equal(step_by_step(model), first)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert float((got - first).abs().max()) > 0.01


def test_a_stack_in_the_weights_is_part_of_them(model):
    one, two, three_ = three(model)
    with baked(model, [one]), baked(model, [two, three_], materialise=True):
        got = step_by_step(model)
    with baked(model, [one]):
        alone = step_by_step(model)
    with baked(model, [one, two, three_], joint=False):
        expected = step_by_step(model)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert float((got - alone).abs().max()) > 0.01


def test_where_nothing_is_gained_the_hooks_stay(model, monkeypatch):
    def run(rows=3):
        with decoding(model, rows):
            model(TOKENS)

    with counted(monkeypatch) as kinds:
        with baked(model, three(model)):
            run()  # derivatives are on
            with torch.no_grad():
                run(FEW + 1)
                with stock(model):
                    run()
        with torch.no_grad():
            with baked(model, three(model), joint=False):
                run()
            with three(model)[0].attach(model):
                run()
            assert kinds == []
            # Nobody but the first has a hook in layer 1.
            with baked(model, three(model)[:1]), three(model)[1].attach(model):
                run()
            assert kinds == list(LINEAR_SITES)


def test_factors_of_another_dtype_keep_their_hooks(gemma, monkeypatch):
    adapter = random_adapter(gemma)
    for factors in (adapter.down, adapter.up):
        for name, factor in factors.items():
            factors[name] = factor.double()
    with baked(gemma, [adapter]), counted(monkeypatch) as kinds:
        assert step_by_step(gemma).dtype == torch.float32
    assert kinds == []


@pytest.mark.parametrize("option", ["use_split_qkv_input", "use_attn_result"])
def test_attention_that_splits_its_heads_keeps_its_hooks(model, monkeypatch, option):
    setattr(model.cfg, option, True)
    try:
        with baked(model, three(model, ["o", "down"])), counted(monkeypatch) as kinds:
            got, expected = step_by_step(model), step_by_step(model, body=hooks_only)
    finally:
        setattr(model.cfg, option, False)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert set(kinds) == {"down"}


def test_inputs_that_somebody_tells_apart_stay_apart(model):
    """A hook in the norm is called for q, k and v each; theirs are then three tensors."""
    calls = iter(range(10**6))

    def differently(x, hook):
        return x * (1 + next(calls) % 3)

    def run(of):
        hooks = [("blocks.1.ln1.hook_normalized", differently)]
        with torch.no_grad(), of.hooks(fwd_hooks=hooks), decoding(of, 3):
            return of(TOKENS)

    adapter = random_adapter(model, ["q", "k", "v"], (1,))
    with baked(model, [adapter]):
        got = run(model)
    torch.testing.assert_close(got, run(merged(model, adapter)), rtol=1e-4, atol=1e-4)


def test_another_cache_is_refused_while_decoding(model):
    def run():
        cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 3)
        model(TOKENS, past_kv_cache=cache)

    with torch.no_grad():
        with (
            baked(model, three(model)),
            decoding(model, 3),
            pytest.raises(ShlError) as error,
        ):
            run()
        assert "TransformerLensKeyValueCacheEntry" in one_sentence(error)
        with baked(model, three(model, ["up"])), decoding(model, 3):
            run()


def test_an_error_inside_brings_the_hooks_back(model):
    with baked(model, three(model)), torch.no_grad():
        before, placed = model(TOKENS), hook_count(model)
        with pytest.raises(KeyError), decoding(model, 3):
            raise KeyError
        assert hook_count(model) == placed
        assert torch.equal(model(TOKENS), before)


def test_bodies_may_be_nested(model):
    with baked(model, three(model)), torch.no_grad():
        with decoding(model, 3):
            one = model(TOKENS)
            with decoding(model, 3):
                assert torch.equal(model(TOKENS), one)
            assert hook_count(model) == 0
            assert torch.equal(model(TOKENS), one)
        assert hook_count(model) > 0


def test_what_failed_half_way_leaves_nothing_behind(gemma):
    def fail(x, hook):
        raise ZeroDivisionError

    x = torch.randn(3, 1, 32, generator=torch.Generator().manual_seed(0))
    mlp = gemma.blocks[0].mlp
    with baked(gemma, three(gemma)), torch.no_grad():
        expected = mlp(x)
        with decoding(gemma, 3):
            mlp.hook_pre.add_hook(fail)
            with pytest.raises(ZeroDivisionError):
                mlp(x)
            gemma.reset_hooks()
            torch.testing.assert_close(mlp(x), expected)
        torch.testing.assert_close(mlp(x), expected)


def test_inference_mode_may_come_and_go(gemma):
    with baked(gemma, three(gemma)):
        with torch.inference_mode():
            inside = step_by_step(gemma)
        assert torch.equal(step_by_step(gemma), inside)
        with torch.inference_mode():
            assert torch.equal(step_by_step(gemma), inside)


def test_copies_are_freed_with_the_handle(gemma):
    with baked(gemma, three(gemma)) as handle:
        step_by_step(gemma)
        copies = [weakref.ref(joint.weight) for joint in handle._groups]
        assert len(copies) == 4 * 3
        assert all(copy() is not None for copy in copies)
    gc.collect()
    assert [copy() for copy in copies] == [None] * len(copies)


def test_generation_takes_that_way_to_the_same_texts(model, monkeypatch):
    prompts = [Prompt("Who are you?"), Prompt("Why do you ask me?"), Prompt("No.")]

    def texts(new=LONG, size=3):
        done = generate(model, prompts, max_new_tokens=new, temperature=0.0, batch_size=size)
        return [completion.tokens for completion in done]

    base = texts()
    with baked(model, three(model), joint=False):
        expected = texts()
    with baked(model, three(model)), counted(monkeypatch) as kinds:
        assert texts() == expected
        assert 0 < len(kinds) <= 7 * 3 * (LONG - 1)  # the first token comes from the prompt
        kinds.clear()
        texts(LONG - 1)
        assert kinds == []  # too few steps for copies of the weights
        texts(LONG - 1, size=2)
        assert kinds != []
    assert expected != base
