"""One factor per token from dose, mask, positions and decay, with the arithmetic written out."""

import pytest
import torch
from helpers import empty_cache, one_sentence, tokens_of

from shl.fast import KVCache
from shl.hooks.handle import Handle, running
from shl.hooks.positions import Scope, track_positions
from shl.utils.errors import ShlError

AT = torch.tensor([[-1, -1, 0, 1, 2], [0, 1, 2, 3, 4]])  # the first row is padded by two


def factors(scope, at=AT):
    return scope.factor(at)[..., 0].tolist()


def test_factor_of_padding_is_0(gemma):
    assert factors(Scope(gemma, 1.5)) == [[0, 0, 1.5, 1.5, 1.5], [1.5] * 5]


def test_dose_per_row(gemma):
    scope = Scope(gemma, torch.tensor([2.0, -1.0]))
    assert factors(scope) == [[0, 0, 2, 2, 2], [-1] * 5]
    with running(rows=[1, 0]):
        assert factors(scope) == [[0, 0, -1, -1, -1], [2] * 5]


def test_mask_counts_without_padding_and_is_false_beyond_its_width(gemma):
    mask = torch.tensor([[True, False, True], [False, True, True]])
    # Row 0 has its tokens 0 and 2, row 1 its tokens 1 and 2; tokens 3 and 4 are beyond.
    assert factors(Scope(gemma, 3.0, mask=mask)) == [[0, 0, 3, 0, 3], [0, 3, 3, 0, 0]]
    with running(rows=[1, 0]):
        assert factors(Scope(gemma, 3.0, mask=mask)) == [[0, 0, 0, 3, 3], [3, 0, 3, 0, 0]]


def test_positions_are_the_same_in_every_row(gemma):
    for positions in ([1, 4], range(1, 5, 3), slice(1, 5, 3)):
        assert factors(Scope(gemma, positions=positions)) == [[0, 0, 0, 1, 0], [0, 1, 0, 0, 1]]
    assert factors(Scope(gemma, positions=slice(2, None)))[1] == [0, 0, 1, 1, 1]


def test_the_dose_halves_from_the_assistant_tag_on(gemma):
    scope = Scope(gemma, 8.0, half_life=1.0)
    assert factors(scope)[1] == [8, 8, 8, 8, 8]  # nothing but prompt
    with running(prompts=[1, 3]):  # the tags are tokens 0 and 2
        assert factors(scope) == [[0, 0, 8, 4, 2], [8, 8, 8, 4, 2]]
    with running(prompts=[2, 2]):
        # 8 * 2 ** (-n / 2) for n = 0, 0, 1, 2, 3
        got = factors(Scope(gemma, 8.0, half_life=2.0))[1]
        assert got == pytest.approx([8, 8, 8 / 2**0.5, 4, 4 / 2**0.5])


def test_factors_multiply(gemma):
    mask = torch.ones(2, 4, dtype=torch.bool)
    dose = torch.tensor([4.0, 8.0])
    scope = Scope(gemma, dose, mask=mask, positions=[0, 2, 3], half_life=1.0)
    with running(prompts=[1, 3]):
        assert factors(scope) == [[0, 0, 4, 0, 1], [8, 0, 8, 4, 0]]


def test_properties_of_scope(gemma):
    mask = torch.ones(2, 4, dtype=torch.bool)
    scopes = [
        (Scope(gemma), True, False, None),
        (Scope(gemma, torch.ones(3)), False, True, 3),
        (Scope(gemma, mask=mask), False, True, 2),
        (Scope(gemma, positions=[1]), False, False, None),
        (Scope(gemma, half_life=3.0), False, True, None),
    ]
    assert [(s.plain, s.per_row, s.rows) for s, *_ in scopes] == [tuple(k[1:]) for k in scopes]
    assert [Scope(gemma, d).whole for d in (1, 1.0, 2.0)] == [True, True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dose": float("nan")}, "dose is nan"),
        ({"dose": torch.tensor([1.0, torch.inf])}, "must be finite"),
        ({"half_life": 0.0}, "half_life is 0.0"),
        ({"half_life": -2.0}, "half_life is -2.0"),
        ({"half_life": float("nan")}, "half_life is nan"),
        ({"mask": torch.ones(2, 513, dtype=torch.bool)}, "(2, 513)"),
        ({"mask": torch.ones(2, 0, dtype=torch.bool)}, "(2, 0)"),
        ({"positions": []}, "positions is []"),
        ({"positions": [-1]}, "positions is [-1], it must have at least one of 0 to 511"),
        ({"positions": [512]}, "positions is [512]"),
        ({"positions": range(510, 514)}, "positions is range(510, 514)"),
        ({"positions": slice(-3, None)}, "positions is slice(-3, None, None)"),
        ({"positions": slice(0, 9, 0)}, "positions is slice(0, 9, 0)"),
        ({"positions": slice("a", None)}, "positions is slice('a', None, None)"),
        ({"positions": slice(600, None)}, "positions is slice(600, None, None)"),
    ],
)
def test_invalid_options_are_rejected(gemma, options, message):
    with pytest.raises(ShlError) as error:
        Scope(gemma, **options)
    assert message in one_sentence(error)


def test_doses_and_mask_with_different_rows_are_rejected(gemma):
    # Under the tests jaxtyping raises first.
    with pytest.raises((ShlError, TypeError), match="dose"):
        Scope(gemma, torch.ones(3), mask=torch.ones(2, 3, dtype=torch.bool))


def test_wrong_number_of_mask_rows_or_prompt_lengths_is_rejected(gemma):
    mask = torch.ones(3, 4, dtype=torch.bool)
    with pytest.raises(ShlError, match="3 rows of a mask were given for a batch of 2 rows"):
        Scope(gemma, mask=mask).factor(AT)
    with (
        running(rows=[0, 4]),
        pytest.raises(ShlError, match="3 rows of a mask were given for at least 5 rows"),
    ):
        Scope(gemma, mask=mask).factor(AT)
    with running(prompts=[1, 2, 3]), pytest.raises(ShlError, match=r"3 prompt lengths .* 2 rows"):
        Scope(gemma, half_life=1.0).factor(AT)


@pytest.fixture
def tracked(model):
    """The calls of `track_positions` for layer 1, one per forward."""
    calls = []
    with Handle(model) as handle:
        track_positions(handle, [1, 1], lambda layer, at: calls.append((layer, at.tolist())))
        yield calls


def test_positions_with_masks_and_caches(model, tracked):
    tokens = tokens_of(2, 4)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    new = torch.ones(2, 1, dtype=torch.long)
    caches = (
        KVCache.empty(model, 2),
        empty_cache(model, 2),
    )
    for cache in caches:
        model(tokens, attention_mask=mask, past_kv_cache=cache)
        for _ in range(2):
            model(new, attention_mask=new, past_kv_cache=cache)
        first = (1, [[-1, -1, 0, 1], [0, 1, 2, 3]])
        assert tracked == [first, (1, [[2], [4]]), (1, [[3], [5]])]
        tracked.clear()


@pytest.mark.hooked  # a bridge has no start_at_layer
def test_positions_without_mask(model, tracked):
    model(tokens_of(1, 3))
    model.run_with_hooks(tokens_of(2, 2))
    model.run_with_cache(tokens_of(1, 2))
    cache = KVCache.empty(model, 1)
    for n in (2, 1, 2):
        model(tokens_of(1, n), past_kv_cache=cache)
    # A run that starts at a later layer has no mask, so positions follow the cache.
    model(torch.ones(1, 2, 32), start_at_layer=1)
    model(torch.ones(1, 2, 32), start_at_layer=1, past_kv_cache=cache)
    assert [at for _, at in tracked] == [
        [[0, 1, 2]],
        [[0, 1], [0, 1]],
        [[0, 1]],
        [[0, 1]],
        [[2]],
        [[3, 4]],
        [[0, 1]],
        [[5, 6]],
    ]
