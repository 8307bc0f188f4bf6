"""One encoder for all: plain and chat prompts, padding, batches by length."""

import pytest
import torch
from helpers import one_sentence
from hypothesis import given, settings
from hypothesis import strategies as st

from shl.models.tiny import tiny_gemma
from shl.models.tokens import (
    Prompt,
    decode,
    encode,
    encode_text,
    end_ids,
    is_chat,
    length_batches,
    pad_left,
    render,
    tokenizer_of,
)
from shl.utils.errors import ShlError

TURNS = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[answer]{% endif %}"
)
CHAT = "{{ bos_token }}" + TURNS
NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('no system turn') }}{% endif %}" + TURNS
)
EOS, BOS = 1, 2


@pytest.fixture(scope="module")
def chat():
    return tiny_gemma(n_layers=1, chat_template=CHAT)


@pytest.fixture(scope="module")
def chat_without_system():
    return tiny_gemma(n_layers=1, chat_template=NO_SYSTEM)


def test_a_model_without_a_template_gets_plain_text(gemma):
    assert not is_chat(gemma)
    assert render(gemma, "Why?") == "Q: Why?\nA:"
    assert render(gemma, Prompt("Why?", "You are calm.")) == "You are calm.\n\nQ: Why?\nA:"


def test_a_chat_model_gets_its_template_with_the_persona_as_the_system_turn(chat):
    assert is_chat(chat)
    assert render(chat, "Why?") == "<bos>[user]Why?\n[answer]"
    asked = Prompt("Why?", "You are calm.")
    assert render(chat, asked) == "<bos>[system]You are calm.\n[user]Why?\n[answer]"


def test_a_template_that_refuses_a_system_turn_opens_the_users(chat_without_system):
    asked = Prompt("Why?", "You are calm.")
    expected = "<bos>[user]You are calm.\n\nWhy?\n[answer]"
    assert render(chat_without_system, asked) == expected
    assert render(chat_without_system, "Why?") == "<bos>[user]Why?\n[answer]"


@pytest.mark.parametrize("prompt", ["Why?", Prompt("Why?", "You are calm.")])
def test_bos_occurs_once_at_the_start(prompt, request):
    for name in ("gemma", "chat", "chat_without_system"):
        ids = encode(request.getfixturevalue(name), prompt)
        assert ids[0] == BOS
        assert ids.count(BOS) == 1


def test_plain_text_is_bos_and_then_one_id_per_character(gemma):
    tokenizer = tokenizer_of(gemma)
    text = "Q: Why?\nA:"
    assert encode(gemma, "Why?") == [BOS, *(tokenizer.get_vocab()[c] for c in text)]
    assert encode(gemma, "Why?")[-1] == tokenizer.get_vocab()[":"]  # the assistant tag


def test_encoding_equals_transformerlens_tokens(gemma):
    assert encode(gemma, "Why?") == gemma.to_tokens("Q: Why?\nA:")[0].tolist()


def test_a_model_without_bos_gets_none():
    model = tiny_gemma(n_layers=1)
    model.cfg.default_prepend_bos = False
    assert BOS not in encode(model, "Why?")


def test_a_completion_is_encoded_as_it_stands(gemma):
    ids = encode_text(gemma, " Rest.\n")
    assert BOS not in ids
    assert decode(gemma, ids) == " Rest.\n"
    assert encode_text(gemma, " Rest.\n", bos=True) == [BOS, *ids]


def test_decoding_keeps_special_tokens_visible(gemma):
    assert decode(gemma, [*encode_text(gemma, "a"), EOS]) == "a<eos>"


def test_a_prompt_longer_than_the_context_is_refused(gemma):
    # n_ctx is 512; BOS and "Q: " "\nA:" take 1 + 3 + 3 ids, and one must stay free to answer.
    assert len(encode(gemma, "x" * 504)) == 511
    with pytest.raises(ShlError) as error:
        encode(gemma, "x" * 505)
    assert "512 tokens" in one_sentence(error)


def test_a_model_without_a_tokenizer_is_refused():
    model = tiny_gemma(n_layers=1)
    model.tokenizer = None
    with pytest.raises(ShlError) as error:
        encode(model, "Why?")
    assert "no tokenizer" in one_sentence(error)


def test_rows_are_padded_on_the_left_to_the_longest(gemma):
    tokens, mask = pad_left(gemma, [[2, 7], [2, 8, 9, 10], [5]])
    assert tokens.tolist() == [[0, 0, 2, 7], [2, 8, 9, 10], [0, 0, 0, 5]]
    assert mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]]
    assert tokens.dtype == mask.dtype == torch.int64


@pytest.mark.parametrize("rows", [[], [[2], []]])
def test_an_empty_batch_or_row_is_refused(gemma, rows):
    with pytest.raises(ShlError, match="at least one row"):
        pad_left(gemma, rows)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 30), max_size=12), st.integers(1, 5))
def test_batches_hold_each_row_once_in_order_of_length(lengths, size):
    batches = length_batches(lengths, size)
    flat = [i for batch in batches for i in batch]
    assert sorted(flat) == list(range(len(lengths)))
    assert [lengths[i] for i in flat] == sorted(lengths)
    assert all(len(batch) == size for batch in batches[:-1])
    assert all(1 <= len(batch) <= size for batch in batches)


def test_a_plain_models_turn_ends_at_eos_only(gemma):
    assert end_ids(gemma) == {EOS}


def test_a_chat_models_turn_ends_at_its_turn_token_too():
    model = tiny_gemma(n_layers=1, chat_template=CHAT)
    model.tokenizer.add_tokens(["<end_of_turn>"], special_tokens=True)
    turn = model.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert turn not in (EOS, BOS)
    assert end_ids(model) == {EOS, turn}
    model.tokenizer.chat_template = None
    assert end_ids(model) == {EOS}  # in plain text that token is no end
