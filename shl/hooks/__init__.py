"""The low-level toolkit: what acts on a model, and where."""

from shl.hooks.handle import (
    PROMPTS,
    ROWS,
    Handle,
    decoding,
    handles_on,
    only_looked_at,
    row_values,
    running,
    suspended,
    watched,
)

__all__ = [
    "PROMPTS",
    "ROWS",
    "Handle",
    "decoding",
    "handles_on",
    "only_looked_at",
    "row_values",
    "running",
    "suspended",
    "watched",
]
