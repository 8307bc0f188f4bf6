"""Handles: sets of hooks on one model that are sure to come off.

Every hook of this package is a plain torch hook owned by a `Handle`. TransformerLens keeps its
own list of hooks, so `model.reset_hooks()` and `model.hooks(...)` neither remove ours nor are
disturbed by them; ours go when their handle is removed or its `with` body ends, however it ends.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformer_lens import HookedTransformer

from shl.errors import check

ROWS: ContextVar[Tensor | None] = ContextVar("shl_rows", default=None)
"""Which rows of the caller's list the current batch holds; `generate` sets it, so that per-row
doses follow their rows when batches are cut, reordered or shrink."""

_HANDLES: "WeakKeyDictionary[HookedTransformer, list[Handle]]" = WeakKeyDictionary()
H = TypeVar("H", bound="Handle")
_SUSPENDED: ContextVar[frozenset[int]] = ContextVar("shl_suspended", default=frozenset())


class Handle:
    """A set of hooks on one model: a context manager, and a handle with `remove()`.

    Subclasses add hooks in `__init__` through `_add`. Entering returns the handle itself; the
    hooks are already on, so a handle works without `with` too.
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
    def on(self) -> bool:
        """False inside `suspended(model)` and after `remove()`."""
        return bool(self._torch_handles) and id(self) not in _SUSPENDED.get()

    def _add(
        self,
        module: nn.Module,
        hook: Callable[[Tensor], Tensor | None],
        argument: str | None = None,
    ) -> None:
        """Run `hook` on a module's output, which its return value replaces unless it is None, or
        (if `argument` is named) only show it that argument, given by keyword or in first place."""

        def after(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
            return hook(output) if id(self) not in _SUSPENDED.get() else None

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if id(self) not in _SUSPENDED.get():
                hook(kwargs[argument] if argument in kwargs else args[0])

        if argument is not None:
            handle = module.register_forward_pre_hook(before, with_kwargs=True)
        else:
            handle = module.register_forward_hook(after)
        self._torch_handles.append(handle)

    def _gate(self, closed: bool) -> None:
        """Called where `suspended` begins (closed) and ends, for what is more than hooks."""

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
    """Close the gates of `handles` (of all of this package's handles on `model`, if none are
    named) for the body: the model is base again, without a second copy.

    Hooks that the caller placed through TransformerLens stay on.

    Example:
        >>> from shl.tiny import tiny_gemma
        >>> model = tiny_gemma()
        >>> with suspended(model):
        ...     handles_on(model)
        ()
    """
    chosen = [h for h in handles or handles_on(model) if h.on]
    token = _SUSPENDED.set(_SUSPENDED.get() | {id(h) for h in chosen})
    for handle in chosen:
        handle._gate(closed=True)
    try:
        yield
    finally:
        _SUSPENDED.reset(token)
        for handle in chosen:
            handle._gate(closed=False)


def watched(module: nn.Module) -> bool:
    """Whether any torch hook is on a module (TransformerLens's are torch hooks too).

    Example:
        >>> from shl.tiny import tiny_gemma
        >>> watched(tiny_gemma().unembed)
        False
    """
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def row_values(values: Tensor, batch: int) -> Tensor:
    """Per-row `values` of the rows that the current batch holds.

    Raises:
        ShlError: there are not as many values as rows.
    """
    rows = ROWS.get()
    if rows is not None:
        check(
            int(rows.max()) < len(values),
            f"{len(values)} per-row doses were given for at least {int(rows.max()) + 1} rows.",
        )
        return values[rows.to(values.device)]
    check(
        len(values) == batch, f"{len(values)} per-row doses were given for a batch of {batch} rows."
    )
    return values
