"""Whether hooks are on a module: the fast classes take the stock path where they are."""

from collections.abc import Callable
from typing import Any

from torch import nn


def is_hooked(module: nn.Module) -> bool:
    """Whether any torch hook is on a module; TransformerLens's hooks are torch hooks too.

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
    """Mark a pre-hook that changes none of the arguments it is given."""
    hook.read_only = True  # type: ignore[attr-defined]
    return hook


def inputs_are_read_only(module: nn.Module) -> bool:
    """Whether no pre-hook on a module may change its arguments: all are marked `read_only`.

    Example:
        >>> module = nn.Identity()
        >>> _ = module.register_forward_pre_hook(read_only(lambda module, args: None))
        >>> inputs_are_read_only(module)
        True
    """
    return all(getattr(h, "read_only", False) for h in module._forward_pre_hooks.values())
