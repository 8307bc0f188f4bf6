"""Hooks on a HookedTransformer: steering, adapters, recording, and where they act.

`Handle` is the base class; its `add_hook` and `add_pre_hook` add a user's hooks to a model.
"""

from shl.hooks.handle import Handle, handles_on, row_values, running, suspended, unhooked

__all__ = ["Handle", "handles_on", "row_values", "running", "suspended", "unhooked"]
