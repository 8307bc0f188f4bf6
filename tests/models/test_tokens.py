"""Plain and chat prompts, padding, batches by length."""

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


def test_model_without_a_template_gets_plain_text(gemma):
    assert not is_chat(gemma)
    assert render(gemma, "Why?") == "Q: Why?\nA:"
    assert render(gemma, Prompt("Why?", "You are calm.")) == "You are calm.\n\nQ: Why?\nA:"


def test_persona_is_the_system_turn_or_the_start_of_the_user_turn(chat, chat_without_system):
    prompt = Prompt("Why?", "You are calm.")
    assert render(chat, prompt) == "<bos>[system]You are calm.\n[user]Why?\n[answer]"
    assert render(chat_without_system, prompt) == "<bos>[user]You are calm.\n\nWhy?\n[answer]"
    for model in (chat, chat_without_system):
        assert is_chat(model)
        assert render(model, "Why?") == "<bos>[user]Why?\n[answer]"


@pytest.mark.parametrize("prompt", ["Why?", Prompt("Why?", "You are calm.")])
def test_bos_occurs_once_at_the_start(prompt, request):
    for name in ("gemma", "chat", "chat_without_system"):
        ids = encode(request.getfixturevalue(name), prompt)
        assert ids[0] == BOS
        assert ids.count(BOS) == 1


def test_plain_text_is_bos_and_then_one_id_per_character(gemma):
    vocab, text = tokenizer_of(gemma).get_vocab(), "Q: Why?\nA:"
    assert encode(gemma, "Why?") == [BOS, *(vocab[c] for c in text)]
    assert encode(gemma, "Why?") == gemma.to_tokens(text)[0].tolist()


def test_model_that_does_not_prepend_bos_gets_none():
    model = tiny_gemma(n_layers=1)
    model.cfg.default_prepend_bos = False
    assert BOS not in encode(model, "Why?")


def test_completion_is_encoded_unchanged_and_decoded_with_special_tokens(gemma):
    ids = encode_text(gemma, " Rest.\n")
    assert BOS not in ids
    assert decode(gemma, [*ids, EOS]) == " Rest.\n<eos>"
    assert encode_text(gemma, " Rest.\n", bos=True) == [BOS, *ids]


def test_prompt_longer_than_the_context_is_rejected(gemma):
    # n_ctx is 512; BOS, "Q: " and "\nA:" are 1 + 3 + 3 ids, and the answer needs at least one.
    assert len(encode(gemma, "x" * 504)) == 511
    with pytest.raises(ShlError) as error:
        encode(gemma, "x" * 505)
    assert "512 tokens" in one_sentence(error)


def test_model_without_a_tokenizer_is_rejected():
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
def test_empty_batch_or_row_is_rejected(gemma, rows):
    with pytest.raises(ShlError, match="at least one row"):
        pad_left(gemma, rows)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 30), max_size=12), st.integers(1, 5))
def test_batches_contain_each_row_once_in_order_of_length(lengths, size):
    batches = length_batches(lengths, size)
    flat = [i for batch in batches for i in batch]
    assert sorted(flat) == list(range(len(lengths)))
    assert [lengths[i] for i in flat] == sorted(lengths)
    assert all(len(batch) == size for batch in batches[:-1])
    assert all(1 <= len(batch) <= size for batch in batches)


def test_turn_ends_at_eos_and_in_chat_models_at_the_turn_token(gemma):
    assert end_ids(gemma) == {EOS}
    model = tiny_gemma(n_layers=1, chat_template=CHAT)
    model.tokenizer.add_tokens(["<end_of_turn>"], special_tokens=True)
    turn = model.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert turn not in (EOS, BOS)
    assert end_ids(model) == {EOS, turn}
    model.tokenizer.chat_template = None
    assert end_ids(model) == {EOS}  # the token does not end plain text
