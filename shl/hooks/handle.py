"""Handles: sets of hooks on one model that are sure to come off.

Every hook of this package is a plain torch hook owned by a `Handle`. TransformerLens keeps its
own list of hooks, so `model.reset_hooks()` and `model.hooks(...)` neither remove ours nor are
disturbed by them; ours go when their handle is removed or its `with` body ends, however it ends.

Whoever runs the model on a part of the caller's rows says so through `running`, so that what
differs by row (a dose, a mask, where the answer begins) stays with its row.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import TracebackType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformer_lens import HookedTransformer

from shl.utils.errors import require

ROWS: ContextVar[Tensor | None] = ContextVar("shl_rows", default=None)
"""Which rows of the caller's list the current batch holds; `generate` sets it, so that per-row
doses follow their rows when batches are cut, reordered or shrink."""
PROMPTS: ContextVar[Tensor | None] = ContextVar("shl_prompts", default=None)
"""How many prompt tokens each row of the current batch begins with; None: nothing but prompts."""

_HANDLES: "WeakKeyDictionary[HookedTransformer, list[Handle]]" = WeakKeyDictionary()
_LOOKING: "WeakSet[Callable[..., None]]" = WeakSet()
H = TypeVar("H", bound="Handle")
Register = Callable[..., RemovableHandle]
_SUSPENDED: ContextVar[frozenset[int]] = ContextVar("shl_suspended", default=frozenset())


class Handle:
    """A set of hooks on one model: a context manager, and a handle with `remove()`.

    Subclasses add hooks in `__init__` through `_add`. Entering returns the handle itself; the
    hooks are already on, so a handle works without `with` too. `model.reset_hooks()` (with
    `including_permanent=True` as well) leaves a handle on: only `remove()` and the end of its
    `with` body take it off, and only `suspended` pauses it.

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> model = tiny_gemma()
        >>> with Handle(model) as handle:
        ...     _ = handle._add(model.hook_embed, lambda x: 0 * x)
        ...     model.reset_hooks(including_permanent=True)
        ...     handle.on
        True
    """

    def __init__(self, model: HookedTransformer) -> None:
        self.model = model
        self._torch_handles: dict[Register, RemovableHandle] = {}
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

    def _add(
        self,
        module: nn.Module,
        hook: Callable[[Tensor], Tensor | None],
        argument: str | None = None,
    ) -> Register:
        """Run `hook` on a module's output, which its return value replaces unless it is None, or
        (if `argument` is named) only show it that argument, given by keyword or in first place."""

        if argument is not None:
            return self._before(module, lambda args, kwargs: hook(kwargs.get(argument, *args[:1])))

        def after(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
            return hook(output) if id(self) not in _SUSPENDED.get() else None

        return self._place(partial(module.register_forward_hook, after))

    def _before(
        self, module: nn.Module, hook: Callable[[tuple[Any, ...], dict[str, Any]], object]
    ) -> Register:
        """Show `hook` the arguments of a module before it runs."""

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if id(self) not in _SUSPENDED.get():
                hook(args, kwargs)

        _LOOKING.add(before)
        return self._place(partial(module.register_forward_pre_hook, before, with_kwargs=True))

    def _place(self, register: Register, **order: bool) -> Register:
        self._torch_handles[register] = register(**order)
        return register

    def _gate(self, closed: bool) -> None:
        """Called where `suspended` begins (closed) and ends, for what is more than hooks."""

    def _decoding(self, rows: int) -> bool:
        """Called where a loop begins that runs a few tokens of so many rows again and again without
        derivatives; returns whether `_decoded` must be called where it ends."""
        return False

    def _decoded(self) -> None:
        pass

    def remove(self) -> None:
        """Take the hooks off; a second call does nothing."""
        for handle in self._torch_handles.values():
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
        >>> from shl.models.tiny import tiny_gemma
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


@contextmanager
def decoding(model: HookedTransformer, rows: int) -> Iterator[None]:
    """Tell the handles on `model` that the body decodes so many rows token by token, as `generate`
    does: what they do stays the same, the way may become a faster one.

    On a CPU, without derivatives and with up to `shl.fast.linear.FEW` rows, baked adapters leave
    those sites that nobody else has hooked (`shl.fast.fused_lora`), until the body ends.

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> model = tiny_gemma()
        >>> with torch.no_grad(), decoding(model, 1):
        ...     logits = model(torch.tensor([[2, 5]]))
    """
    told = [handle for handle in handles_on(model) if handle._decoding(rows)]
    try:
        yield
    finally:
        for handle in told:
            handle._decoded()


def watched(module: nn.Module) -> bool:
    """Whether any torch hook is on a module (TransformerLens's are torch hooks too).

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> watched(tiny_gemma().unembed)
        False
    """
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def only_looked_at(module: nn.Module) -> bool:
    """Whether nobody but this package, whose hooks change no argument, sees a module's arguments.

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> only_looked_at(tiny_gemma().unembed)
        True
    """
    return all(hook in _LOOKING for hook in module._forward_pre_hooks.values())


@contextmanager
def running(
    *, rows: Sequence[int] | None = None, prompts: Sequence[int] | None = None
) -> Iterator[None]:
    """Say for the body which of the caller's rows the batch holds, and how many prompt tokens
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
