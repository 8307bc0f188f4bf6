"""Encoding, decoding, padding and batching of prompts and completions.

Chat models use their tokenizer's template, with the persona as the system turn. Models without a
template get plain text: persona, a blank line, `Q: ...` and `A:`. All text is encoded here, without
the tokenizer's special tokens; BOS is prepended if the model expects it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from shl.utils.errors import ShlError, require
from shl.utils.model import Model
from shl.utils.shapes import Mask, Tokens

TURN_ENDS = ("<end_of_turn>", "<|im_end|>", "<|eot_id|>")
PLAIN_STOPS = ("\nQ:", "\nA:")
"""Texts that end the answer of a model without a chat template: the start of the next turn."""


@dataclass(frozen=True)
class Prompt:
    """A question, and optionally the persona that answers it.

    With `plain`, the text is the beginning of running text, without the question's format.

    Example:
        >>> Prompt("How do you rest?", persona="You are calm.")
        Prompt(text='How do you rest?', persona='You are calm.', plain=False)
    """

    text: str
    persona: str | None = None
    plain: bool = False


def tokenizer_of(model: Model) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ShlError: the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise ShlError("the model has no tokenizer, load one with it.")
    return model.tokenizer


def is_chat(model: Model) -> bool:
    """Whether the tokenizer has a chat template, which prompts then use."""
    return bool(tokenizer_of(model).chat_template)


def as_prompt(prompt: str | Prompt) -> Prompt:
    """Convert a string to a prompt without a persona."""
    return Prompt(prompt) if isinstance(prompt, str) else prompt


def render(model: Model, prompt: str | Prompt) -> str:
    """The text of a prompt up to the assistant tag; without BOS if there is no chat template."""
    prompt = as_prompt(prompt)
    persona = f"{prompt.persona}\n\n" if prompt.persona else ""
    if prompt.plain:
        return persona + prompt.text
    if not is_chat(model):
        return f"{persona}Q: {prompt.text}\nA:"
    template: Any = partial(
        tokenizer_of(model).apply_chat_template, tokenize=False, add_generation_prompt=True
    )
    system = [{"role": "system", "content": prompt.persona}] if prompt.persona else []
    try:
        return template([*system, {"role": "user", "content": prompt.text}])
    except TemplateError:
        # Some templates do not support a system turn; the persona then starts the user's turn.
        return template([{"role": "user", "content": persona + prompt.text}])


def encode_text(model: Model, text: str, *, bos: bool = False) -> list[int]:
    """Token ids of `text`; `bos=True` prepends BOS if the model expects it."""
    tokenizer = tokenizer_of(model)
    ids = tokenizer.encode(text, add_special_tokens=False)
    first = [tokenizer.bos_token_id] if bos and model.cfg.default_prepend_bos else []
    return first + ids


def encode(model: Model, prompt: str | Prompt) -> list[int]:
    """Token ids of a rendered prompt; the last one is the assistant tag.

    Raises:
        ShlError: the prompt is longer than the model's context.
    """
    prompt = as_prompt(prompt)
    ids = encode_text(model, render(model, prompt), bos=prompt.plain or not is_chat(model))
    require(
        len(ids) < model.cfg.n_ctx,
        f"a prompt has {len(ids)} tokens, it must have fewer than {model.cfg.n_ctx}, the context "
        f"of {model.cfg.model_name}.",
    )
    return ids


def decode(model: Model, ids: Sequence[int]) -> str:
    """The text of completion tokens, special tokens included."""
    return str(tokenizer_of(model).decode(list(ids), skip_special_tokens=False))


def end_ids(model: Model) -> frozenset[int]:
    """Tokens that end the assistant's turn."""
    tokenizer = tokenizer_of(model)
    vocab = tokenizer.get_added_vocab()
    ids = {vocab[token] for token in TURN_ENDS if token in vocab and is_chat(model)}
    return frozenset(ids | {tokenizer.eos_token_id})


def pad_left(model: Model, rows: Sequence[Sequence[int]]) -> tuple[Tokens, Mask]:
    """Tokens and mask of rows of ids, padded on the left to the longest, on the model's device."""
    require(len(rows) > 0 and all(rows), "a batch needs at least one row, each with a token.")
    width = max(map(len, rows))
    pad = tokenizer_of(model).pad_token_id or 0
    tokens = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    device = model.W_U.device
    return tokens.to(device), mask.to(device)


def length_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices in batches of at most `size`, sorted by length to minimise padding.

    Example:
        >>> length_batches([5, 1, 4, 2], 2)
        [[1, 3], [2, 0]]
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    return [order[i : i + size] for i in range(0, len(order), size)]
