"""Errors of bad input, and batches that halve when the GPU runs out of memory."""

import warnings
from collections.abc import Callable, Sequence

import torch


class ShlError(ValueError):
    """One sentence that names the value seen and what is allowed.

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
    """Half of a batch size that did not fit the GPU's memory, with a warning that says so.

    Raises:
        ShlError: one row alone did not fit.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     halve(5, "generation")
        3
    """
    if size <= 1:
        raise ShlError(
            f"the GPU has no memory left for {what} of a single row; use a smaller model or dtype."
        )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    smaller = (size + 1) // 2
    warnings.warn(
        f"{what} of {size} rows did not fit the GPU's memory, going on with {smaller}; the last "
        "bits of the results depend on it.",
        RuntimeWarning,
        stacklevel=3,
    )
    return smaller


def in_batches(batches: Sequence[list[int]], work: Callable[[list[int]], None], what: str) -> None:
    """Call `work` on each batch of indices; one that runs out of GPU memory is halved, and so
    are those after it.

    `work` keeps its results only at its end, so that a batch may be tried again.

    Raises:
        ShlError: one row alone did not fit.

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
            # Halved outside the handler, whose traceback keeps the failed batch's tensors alive.
            pass
        limit = halve(len(batch), what)
        pending.append(batch)
