"""Checks for non-finite numbers that name the place where they arose."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shl.hooks.handle import running
from shl.utils.errors import ShlError
from shl.utils.model import Model


class NotFiniteError(ShlError):
    """NaN or infinity among activations, losses, gradients or scores."""


@contextmanager
def named(where: str) -> Iterator[None]:
    """Prefix the message of a `NotFiniteError` with `where` (a round and a stage).

    Example:
        >>> with named("round 0, vector"):
        ...     raise NotFiniteError("a residual is nan.")
        Traceback (most recent call last):
        shl.models.nan_checks.NotFiniteError: round 0, vector: a residual is nan.
    """
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError(f"{where}: {error}") from error


def require_finite(
    values: Tensor,
    what: str,
    model: Model,
    rows: Callable[[], Sequence[Sequence[int]]],
    numbers: Sequence[int] | None = None,
) -> None:
    """Raise unless all `values` are finite; the message names the first module whose output is not.

    Args:
        what: a singular noun phrase for the message.
        rows: returns the token ids of the model's input; called on failure only.
        numbers: indices of these rows in the caller's list, for hooks with per-row values.

    Raises:
        NotFiniteError: a value is not finite.
    """
    finite = torch.isfinite(values)
    if bool(finite.all()):
        return
    value = float(values[~finite][0])
    raise NotFiniteError(
        f"{what} is {value}, it must be finite; {first_not_finite(model, rows(), numbers)}."
    )


@torch.no_grad()
def first_not_finite(
    model: Model,
    rows: Sequence[Sequence[int]],
    numbers: Sequence[int] | None = None,
) -> str:
    """The first module that outputs NaN or infinity when each row is run alone, hooks included.

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> model = tiny_gemma()
        >>> _ = model.blocks[1].mlp.W_out.data.fill_(float("nan"))
        >>> first_not_finite(model, [[2, 9]])
        'the first site with such a number is blocks.1.mlp'
    """
    culprits: list[str] = []

    def inspect(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        is_float = isinstance(output, Tensor) and output.is_floating_point()
        if is_float and not culprits and not bool(torch.isfinite(output).all()):
            culprits.append(name)

    # Attention scores before the softmax are minus infinity at masked positions.
    handles = [
        module.register_forward_hook(partial(inspect, name))
        for name, module in model.named_modules()
        if name and not name.endswith("hook_attn_scores")
    ]
    try:
        for k, row in enumerate(rows):
            with running(rows=[k if numbers is None else numbers[k]]):
                model(torch.tensor([list(row)], device=model.W_U.device))
            if culprits:
                place = culprits[0].replace("._original_component", "")
                return f"the first site with such a number is {place}"
    finally:
        for handle in handles:
            handle.remove()
    return "no module's output alone has such a number"
