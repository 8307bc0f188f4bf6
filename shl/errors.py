"""The one exception that `shl` raises on bad input, so a caller can tell it from a bug."""


class ShlError(ValueError):
    """One sentence that names the value seen and what is allowed.

    Example:
        >>> from shl.errors import ShlError
        >>> issubclass(ShlError, ValueError)
        True
    """


def check(condition: bool, message: str) -> None:
    """Raise `ShlError(message)` unless `condition` holds.

    Example:
        >>> from shl.errors import check
        >>> check(1 < 2, "never raised")
    """
    if not condition:
        raise ShlError(message)
