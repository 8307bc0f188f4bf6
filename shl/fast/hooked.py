"""Checks for hooks on a module: the fast classes run TransformerLens's code where there are any."""

from collections.abc import Callable
from typing import Any

from torch import nn


def is_hooked(module: nn.Module) -> bool:
    """Whether a module has any torch hook; TransformerLens's hooks are torch hooks too.

    Example:
        >>> is_hooked(nn.Identity())
        False
    """
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def read_only(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a pre-hook as not changing its arguments."""
    hook.read_only = True  # type: ignore[attr-defined]
    return hook


def inputs_are_read_only(module: nn.Module) -> bool:
    """Whether all pre-hooks on a module are marked `read_only`.

    Example:
        >>> module = nn.Identity()
        >>> _ = module.register_forward_pre_hook(read_only(lambda module, args: None))
        >>> inputs_are_read_only(module)
        True
    """
    return all(getattr(h, "read_only", False) for h in module._forward_pre_hooks.values())
