"""Handles: sets of hooks on one model that are sure to come off.

Every hook of this package is a plain torch hook owned by a `Handle`. TransformerLens keeps its
own list of hooks, so `model.reset_hooks()` and `model.hooks(...)` neither remove ours nor are
disturbed by them; ours go when their handle is removed or its `with` body ends, however it ends.

Code that runs the model on a part of the caller's rows says so through `running`, so that what
differs by row (a dose, a mask, where the answer begins) stays with its row.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformer_lens import HookedTransformer

from shl.fast import read_only
from shl.utils.errors import require

ROWS: ContextVar[Tensor | None] = ContextVar("shl_rows", default=None)
"""Which rows of the caller's list the current batch holds; `generate` sets it, so that per-row
doses follow their rows when batches are cut, reordered or shrink."""
PROMPTS: ContextVar[Tensor | None] = ContextVar("shl_prompts", default=None)
"""How many prompt tokens each row of the current batch begins with; None: nothing but prompts."""

_HANDLES: "WeakKeyDictionary[HookedTransformer, list[Handle]]" = WeakKeyDictionary()
H = TypeVar("H", bound="Handle")
_SUSPENDED: ContextVar[frozenset[int]] = ContextVar("shl_suspended", default=frozenset())


class Handle:
    """A set of hooks on one model: a context manager, and a handle with `remove()`.

    Subclasses add hooks in `__init__` through `add_hook` and `add_pre_hook`. Entering returns the
    handle itself; the hooks are already on, so a handle works without `with` too.
    `model.reset_hooks()` (with `including_permanent=True` as well) leaves a handle on: only
    `remove()` and the end of its `with` body take it off, and only `suspended` pauses it.

    Attributes:
        model: the model that the hooks are on.

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> model = tiny_gemma()
        >>> with Handle(model) as handle:
        ...     handle.add_hook(model.hook_embed, lambda x: 0 * x)
        ...     model.reset_hooks(including_permanent=True)
        ...     handle.on
        True
    """

    def __init__(self, model: HookedTransformer) -> None:
        self.model = model
        self._torch_handles: list[RemovableHandle] = []
        _HANDLES.setdefault(model, []).append(self)

    @property
    def per_row(self) -> bool:
        """Whether rows of a batch are treated differently, so that none may stand for all."""
        return False

    @property
    def rows(self) -> int | None:
        """How many rows it has values for; None where every row is treated alike."""
        return None

    @property
    def on(self) -> bool:
        """False inside `suspended(model)` and after `remove()`."""
        return bool(self._torch_handles) and id(self) not in _SUSPENDED.get()

    def add_hook(self, module: nn.Module, hook: Callable[[Tensor], Tensor | None]) -> None:
        """Run `hook` on a module's output, which its return value replaces unless it is None."""

        def after(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
            return hook(output) if id(self) not in _SUSPENDED.get() else None

        self._torch_handles.append(module.register_forward_hook(after))

    def add_pre_hook(
        self, module: nn.Module, hook: Callable[[tuple[Any, ...], dict[str, Any]], object]
    ) -> None:
        """Call `hook(args, kwargs)` before a module runs; it must not change them."""

        @read_only
        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if id(self) not in _SUSPENDED.get():
                hook(args, kwargs)

        self._torch_handles.append(module.register_forward_pre_hook(before, with_kwargs=True))

    def owns_all_hooks(self, module: nn.Module) -> bool:
        """Whether every forward hook on a module is one of this handle's."""
        own = {handle.id for handle in self._torch_handles}
        return module._forward_hooks.keys() | module._forward_pre_hooks.keys() <= own

    def _pause(self, paused: bool) -> None:
        """Called where `suspended` begins (True) and ends, for what is more than hooks."""

    def remove(self) -> None:
        """Take the hooks off; a second call does nothing."""
        for handle in self._torch_handles:
            handle.remove()
        self._torch_handles.clear()
        handles = _HANDLES.get(self.model, [])
        if self in handles:
            handles.remove(self)

    def __enter__(self: H) -> H:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


def handles_on(model: HookedTransformer) -> tuple[Handle, ...]:
    """This package's handles that are on `model` now, oldest first."""
    return tuple(h for h in _HANDLES.get(model, []) if h.on)


@contextmanager
def suspended(model: HookedTransformer, *handles: Handle) -> Iterator[None]:
    """Pause `handles` (all of this package's handles on `model`, if none are named) for the body:
    the model is base again, without a second copy.

    Hooks that the caller placed through TransformerLens stay on.

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
def unhooked(model: HookedTransformer) -> Iterator[None]:
    """Run the body on base without any hook: this package's handles are paused, and all other
    forward hooks, TransformerLens's included, are off and come back.

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> model = tiny_gemma()
        >>> with model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: 0 * x)]), unhooked(model):
        ...     bool(model("hi").std() > 0.1)
        True
    """
    with suspended(model):
        kept = [(m, m._forward_hooks, m._forward_pre_hooks) for m in model.modules()]
        for module, after, before in kept:
            if after or before:
                module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()
        try:
            yield
        finally:
            for module, after, before in kept:
                module._forward_hooks, module._forward_pre_hooks = after, before


@contextmanager
def running(
    *, rows: Sequence[int] | None = None, prompts: Sequence[int] | None = None
) -> Iterator[None]:
    """Declare for the body which of the caller's rows the batch holds, and how many prompt tokens
    each of them begins with.

    Example:
        >>> with running(rows=[2, 0], prompts=[13, 9]):
        ...     row_values(torch.tensor([0.1, 0.2, 0.3]), 2)
        tensor([0.3000, 0.1000])
    """
    held = [
        (variable, variable.set(torch.tensor(list(values))))
        for variable, values in ((ROWS, rows), (PROMPTS, prompts))
        if values is not None
    ]
    try:
        yield
    finally:
        for variable, token in held:
            variable.reset(token)


def row_values(values: Tensor, batch: int, what: str = "per-row doses") -> Tensor:
    """Per-row `values` of the rows that the current batch holds.

    Raises:
        ShlError: there are not as many values as rows.
    """
    rows, n = ROWS.get(), len(values)
    if rows is not None:
        least = int(rows.max()) + 1
        require(least <= n, f"{n} {what} were given for at least {least} rows.")
        return values[rows.to(values.device)]
    require(n == batch, f"{n} {what} were given for a batch of {batch} rows.")
    return values
