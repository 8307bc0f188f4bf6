"""The low-level toolkit: what acts on a model, and where.

`Handle` is the base of every hook; `add_hook` and `add_pre_hook` put your own on a model.
"""

from shl.hooks.handle import (
    PROMPTS,
    ROWS,
    Handle,
    handles_on,
    row_values,
    running,
    suspended,
    unhooked,
)

__all__ = [
    "PROMPTS",
    "ROWS",
    "Handle",
    "handles_on",
    "row_values",
    "running",
    "suspended",
    "unhooked",
]
