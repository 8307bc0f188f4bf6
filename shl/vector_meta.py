"""What a steering vector's file says of itself, and what of that may be believed."""

from collections.abc import Mapping
from reprlib import repr as short
from typing import Any

from torch import Tensor

from shl.errors import check
from shl.files import Kinds
from shl.shapes import Direction

NONE = type(None)
KINDS: Kinds = {
    "model": (str,),
    "weights": (str, NONE),
    "dtype": (str, NONE),
    "axis": (str,),
    "round": (int, NONE),
    "contexts": (int,),
    "rule": (str, NONE),
    "token": (str, NONE),
    "hooks": (list,),
}
"""The metadata of format `shl-vector-3`, beside `format` and `identity`: the base's name, weights
(`shl.fingerprint.weights_hash`) and dtype; extraction rule and token; the hook of each tensor."""


def hook_of(layer: int) -> str:
    """The HookPoint after a layer, which is the key of its direction.

    Example:
        >>> hook_of(9)
        'blocks.9.hook_resid_post'
    """
    return f"blocks.{layer}.hook_resid_post"


def read_directions(
    what: object, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[int, Direction]:
    """The directions of a file by layer, in order.

    Raises:
        ShlError: a key that is no HookPoint after a layer, another shape than `[d_model]`, none
            at all, or hooks that are not those of the metadata.
    """
    layers: dict[int, Tensor] = {}
    for key, v in tensors.items():
        name = key.split(".")
        own = len(name) == 3 and name[1].isdecimal() and len(name[1]) < 10
        check(
            own and key == hook_of(int(name[1])),
            f"{what} holds {key!r}, a vector's keys are blocks.LAYER.hook_resid_post.",
        )
        shape = tuple(v.shape)
        check(len(shape) == 1, f"{key} in {what} has shape {shape}, it must be (d_model,).")
        layers[int(name[1])] = v
    check(len(layers) > 0, f"{what} holds no direction.")
    hooks = [hook_of(layer) for layer in sorted(layers)]
    check(
        meta["hooks"] == hooks,
        f"{what} says hooks = {short(meta['hooks'])}, by its tensors that is {short(hooks)}.",
    )
    return dict(sorted(layers.items()))
