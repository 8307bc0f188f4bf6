"""Errors for invalid input, and batches that are halved when the GPU runs out of memory."""

import warnings
from collections.abc import Callable, Sequence

import torch


class ShlError(ValueError):
    """Invalid input; the message states the value and what is allowed.

    Example:
        >>> issubclass(ShlError, ValueError)
        True
    """


def require(condition: bool, message: str) -> None:
    """Raise `ShlError(message)` unless `condition` holds.

    Example:
        >>> require(1 < 2, "never raised")
    """
    if not condition:
        raise ShlError(message)


def halve(size: int, what: str) -> int:
    """Half of a batch size that did not fit into the GPU's memory; warns about the change.

    Raises:
        ShlError: the batch has a single row.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     halve(5, "generation")
        3
    """
    if size <= 1:
        raise ShlError(
            f"the GPU has too little memory for {what} of a single row; use a smaller model or "
            "dtype."
        )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    smaller = (size + 1) // 2
    warnings.warn(
        f"{what} of {size} rows did not fit into the GPU's memory, continuing with {smaller}; "
        "results change in their last bits.",
        RuntimeWarning,
        stacklevel=3,
    )
    return smaller


def in_batches(batches: Sequence[list[int]], work: Callable[[list[int]], None], what: str) -> None:
    """Call `work` on each batch of indices. If one runs out of GPU memory, it and all later batches
    are halved.

    `work` must store its results only at its end, because a batch may be tried again.

    Raises:
        ShlError: a single row does not fit into the GPU's memory.

    Example:
        >>> in_batches([[0, 1], [2]], lambda rows: print(rows), "printing")
        [0, 1]
        [2]
    """
    limit = max(map(len, batches), default=1)
    pending = [list(batch) for batch in reversed(batches)]
    while pending:
        batch = pending.pop()
        if len(batch) > limit:
            pending += [batch[limit:], batch[:limit]]
            continue
        try:
            work(batch)
            continue
        except torch.OutOfMemoryError:
            # Halve outside the handler: its traceback keeps the failed batch's tensors alive.
            pass
        limit = halve(len(batch), what)
        pending.append(batch)
