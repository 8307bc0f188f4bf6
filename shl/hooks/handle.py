"""Handles: sets of hooks on one model that are removed together.

Every hook of this package is a torch hook owned by a `Handle`. TransformerLens keeps a separate
list of hooks; `model.reset_hooks()` and `model.hooks(...)` change that list only.

Code that runs the model on some of the caller's rows declares them with `running`, so that per-row
values (a dose, a mask, the length of the prompt) are applied to the right rows.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from shl.fast import read_only
from shl.utils.errors import require
from shl.utils.model import Model

ROWS: ContextVar[Tensor | None] = ContextVar("shl_rows", default=None)
"""Indices of the current batch's rows in the caller's list, for per-row values. `generate` sets it
whenever it splits, reorders or shrinks batches."""
PROMPTS: ContextVar[Tensor | None] = ContextVar("shl_prompts", default=None)
"""Number of prompt tokens of each row of the current batch; None if all tokens are prompt."""

_HANDLES: "WeakKeyDictionary[Model, list[Handle]]" = WeakKeyDictionary()
H = TypeVar("H", bound="Handle")
_SUSPENDED: ContextVar[frozenset[int]] = ContextVar("shl_suspended", default=frozenset())


class Handle:
    """A set of hooks on one model: a context manager, and a handle with `remove()`.

    Subclasses add hooks in `__init__` with `add_hook` and `add_pre_hook`. Hooks are active from
    then on, so a handle works without `with` too. `model.reset_hooks()` does not remove a handle,
    even with `including_permanent=True`: only `remove()` and the end of its `with` body do,
    exceptions included, and only `suspended` pauses it.

    Attributes:
        model: the hooked model.
        per_row: whether the hooks may treat rows of a batch differently, so that each must be run.
        rows: number of rows with per-row values; None if all rows are treated alike.

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> model = tiny_gemma()
        >>> with Handle(model) as handle:
        ...     handle.add_hook(model.hook_embed, lambda x: 0 * x)
        ...     model.reset_hooks(including_permanent=True)
        ...     handle.on
        True
    """

    per_row: bool = False
    rows: int | None = None

    def __init__(self, model: Model) -> None:
        self.model = model
        self._torch_handles: list[RemovableHandle] = []
        _HANDLES.setdefault(model, []).append(self)

    @property
    def on(self) -> bool:
        """False inside `suspended(model)` and after `remove()`."""
        return bool(self._torch_handles) and id(self) not in _SUSPENDED.get()

    def add_hook(self, module: nn.Module, hook: Callable[[Tensor], Tensor | None]) -> None:
        """Call `hook` on a module's output; a return value other than None replaces the output."""

        def after(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
            return hook(output) if id(self) not in _SUSPENDED.get() else None

        self._torch_handles.append(module.register_forward_hook(after))

    def add_pre_hook(
        self, module: nn.Module, hook: Callable[[tuple[Any, ...], dict[str, Any]], object]
    ) -> None:
        """Call `hook(args, kwargs)` before a module runs; it must not modify them."""

        @read_only
        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if id(self) not in _SUSPENDED.get():
                hook(args, kwargs)

        self._torch_handles.append(module.register_forward_pre_hook(before, with_kwargs=True))

    def owns_all_hooks(self, module: nn.Module) -> bool:
        """Whether all forward hooks on a module belong to this handle."""
        ids = {handle.id for handle in self._torch_handles}
        return module._forward_hooks.keys() | module._forward_pre_hooks.keys() <= ids

    def _pause(self, paused: bool) -> None:
        """Called when `suspended` begins (True) and ends (False)."""

    def remove(self) -> None:
        """Remove the hooks; a second call does nothing."""
        for handle in self._torch_handles:
            handle.remove()
        self._torch_handles.clear()
        with suppress(KeyError, ValueError):
            _HANDLES[self.model].remove(self)

    def __enter__(self: H) -> H:
        return self

    def __exit__(self, *_error: object) -> None:
        self.remove()


def handles_on(model: Model) -> tuple[Handle, ...]:
    """The active handles on `model`, oldest first."""
    return tuple(h for h in _HANDLES.get(model, []) if h.on)


@contextmanager
def suspended(model: Model, *handles: Handle) -> Iterator[None]:
    """Pause `handles`, by default all handles on `model`, inside the body; hooks added through
    TransformerLens stay active.

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> model = tiny_gemma()
        >>> with suspended(model):
        ...     handles_on(model)
        ()
    """
    chosen = [h for h in handles or handles_on(model) if h.on]
    token = _SUSPENDED.set(_SUSPENDED.get() | {id(h) for h in chosen})
    for handle in chosen:
        handle._pause(True)
    try:
        yield
    finally:
        _SUSPENDED.reset(token)
        for handle in chosen:
            handle._pause(False)


@contextmanager
def unhooked(model: Model) -> Iterator[None]:
    """Run the body on the base model without any hook, TransformerLens's included.

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> model = tiny_gemma()
        >>> with model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: 0 * x)]), unhooked(model):
        ...     bool(model("hi").std() > 0.1)
        True
    """
    with suspended(model):
        saved = [(m, m._forward_hooks, m._forward_pre_hooks) for m in model.modules()]
        for module, after, before in saved:
            if after or before:
                module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()
        try:
            yield
        finally:
            for module, after, before in saved:
                module._forward_hooks, module._forward_pre_hooks = after, before


@contextmanager
def running(
    *, rows: Sequence[int] | None = None, prompts: Sequence[int] | None = None
) -> Iterator[None]:
    """Declare the rows of the caller's list in the current batch, and their numbers of prompt
    tokens.

    Example:
        >>> with running(rows=[2, 0], prompts=[13, 9]):
        ...     row_values(torch.tensor([0.1, 0.2, 0.3]), 2)
        tensor([0.3000, 0.1000])
    """
    tokens = [
        (variable, variable.set(torch.tensor(list(values))))
        for variable, values in ((ROWS, rows), (PROMPTS, prompts))
        if values is not None
    ]
    try:
        yield
    finally:
        for variable, token in tokens:
            variable.reset(token)


def row_values(values: Tensor, batch: int, what: str = "per-row doses") -> Tensor:
    """The per-row `values` of the current batch's rows.

    Raises:
        ShlError: the number of values differs from the number of rows.
    """
    rows, n = ROWS.get(), len(values)
    if rows is not None:
        least = int(rows.max()) + 1
        require(least <= n, f"{n} {what} were given for at least {least} rows.")
        return values[rows.to(values.device)]
    require(n == batch, f"{n} {what} were given for a batch of {batch} rows.")
    return values
