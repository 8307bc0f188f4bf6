"""A model's name, dtype and a fast hash of its base weights.

Vectors and adapters store all three, so that they are not put onto another model unnoticed.
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from shl.hooks.handle import suspended
from shl.utils.errors import require

SAMPLED = 65_536
"""The most elements of one parameter that enter the hash."""


def weights_hash(model: HookedTransformer) -> str:
    """SHA-256 (64 hex digits) over each base parameter's name, shape and up to 65,536 of its
    elements, evenly strided, as fp32.

    It tells models, fine-tunes and dtypes apart in a fraction of a second, on any device and
    whatever adapters are on. It is no checksum: a change of a single element may go unnoticed.

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> weights_hash(tiny_gemma()) == weights_hash(tiny_gemma()) != weights_hash(
        ...     tiny_gemma(seed=1)
        ... )
        True
    """
    digest = hashlib.sha256()
    with suspended(model):  # base's own tensors, even while a stack is in the weights
        for name, parameter in sorted(model.named_parameters()):
            digest.update(f"{name} {list(parameter.shape)}\n".encode())
            digest.update(_sampled(parameter.detach()).numpy().tobytes())
    return digest.hexdigest()


def _sampled(x: Tensor) -> Tensor:
    """Evenly strided elements in logical order, fp32, on the CPU."""
    # An odd stride meets every column of a matrix whose width is a power of two.
    stride = -(-x.numel() // SAMPLED) | 1
    at = torch.arange(0, x.numel(), stride, device=x.device)
    # By index: flattening would copy a parameter that is a transposed view.
    return x[torch.unravel_index(at, x.shape)].float().cpu()


def name_of(model: HookedTransformer) -> str:
    """The model's name in what is made on it; of a local folder the last part, since where it
    lies says nothing about it.

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> name_of(tiny_gemma())
        'tiny-gemma'
    """
    name = str(model.cfg.model_name)
    path = Path(name).expanduser()
    return path.resolve().name if path.is_absolute() or path.is_dir() else name


def dtype_of(model: HookedTransformer) -> str:
    """The dtype of the model's weights, such as `float32`."""
    return str(model.W_U.dtype).removeprefix("torch.")


def check_made_for(
    model: HookedTransformer,
    what: str,
    name: str,
    weights: str | None,
    dtype: str | None,
    *,
    any_weights: bool,
) -> None:
    """Raise, naming the first difference, unless `what` was made on the model's own weights.

    Args:
        any_weights: only the name must be the model's.
    """
    own = name_of(model)
    require(name == own, f"{what} was made for {name}, the model is {own}.")
    if any_weights:
        return
    accept = "any_weights=True takes it nonetheless"
    require(
        weights is not None and dtype is not None,
        f"{what} does not say on which weights of {name} it was made; {accept}.",
    )
    require(
        dtype == dtype_of(model),
        f"{what} was made on {name} in {dtype}, the model is in {dtype_of(model)}; {accept}.",
    )
    found = weights_hash(model)
    require(
        weights == found,
        f"{what} was made on weights of {name} with the hash {str(weights)[:12]}, the model's "
        f"have {found[:12]}; {accept}.",
    )
