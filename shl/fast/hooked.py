"""Checks for hooks on a module: the fast classes run TransformerLens's code where there are any."""

from collections.abc import Callable
from typing import Any

from torch import nn

from shl.utils.model import Model


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


def marked_fast(module: nn.Module) -> bool:
    """Whether a module's class is one of `shl.fast`, by its attribute `fast`: TransformerLens 4
    does not have the classes that most of them are made of."""
    return bool(getattr(type(module), "fast", False))


def is_fast(model: Model) -> bool:
    """Whether all attentions of a model are those of `shl.fast`."""
    return all(marked_fast(block.attn) for block in model.blocks)
