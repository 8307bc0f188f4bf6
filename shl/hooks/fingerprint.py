"""A model's name, dtype and a fast hash of its base weights, and files that contain them.

Vectors and adapters store all three, so that loading them onto another model is an error.
"""

import hashlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from shl.hooks.handle import suspended
from shl.hooks.sites import base_parameters
from shl.utils.errors import require
from shl.utils.files import Schema, identity, require_metadata, write_safetensors
from shl.utils.model import Model

SAMPLED = 65_536
"""The largest number of elements of one parameter in the hash."""


def weights_hash(model: Model) -> str:
    """SHA-256 (64 hex digits) over the name, shape and up to 65,536 evenly strided elements (fp32)
    of each base parameter.

    It distinguishes models, fine-tunes and dtypes in a fraction of a second and does not depend on
    the device or on attached adapters. It is not a checksum: a change of one element may be missed.

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> weights_hash(tiny_gemma()) == weights_hash(tiny_gemma()) != weights_hash(
        ...     tiny_gemma(seed=1)
        ... )
        True
    """
    digest = hashlib.sha256()
    with suspended(model):  # restores base's tensors if a stack is merged into the weights
        for name, parameter in sorted(base_parameters(model)):
            digest.update(f"{name} {list(parameter.shape)}\n".encode())
            digest.update(_sampled(parameter.detach()).numpy().tobytes())
    return digest.hexdigest()


def _sampled(x: Tensor) -> Tensor:
    """Evenly strided elements in logical order, fp32, on the CPU."""
    # An odd stride covers every column of a matrix whose width is a power of two.
    stride = -(-x.numel() // SAMPLED) | 1
    at = torch.arange(0, x.numel(), stride, device=x.device)
    # Indexing, because flattening would copy a parameter that is a transposed view.
    return x[torch.unravel_index(at, x.shape)].float().cpu()


def name_of(model: Model) -> str:
    """The model's name as stored in vectors and adapters; for a local folder its last part.

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> name_of(tiny_gemma())
        'tiny-gemma'
    """
    name = str(model.cfg.model_name)
    path = Path(name).expanduser()
    return path.resolve().name if path.is_absolute() or path.is_dir() else name


def dtype_of(model: Model) -> str:
    """The dtype of the model's weights, such as `float32`."""
    return str(model.W_U.dtype).removeprefix("torch.")


class Stored(ABC):
    """Base class of vectors and adapters: a safetensors file with the fingerprint of a model."""

    FORMAT: ClassVar[str]
    SCHEMA: ClassVar[Schema]
    model_name: str
    weights: str | None
    dtype: str | None

    @abstractmethod
    def _content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and metadata to store."""

    def identity(self) -> str:
        """The checksum that `save` writes: SHA-256 of tensors and metadata."""
        tensors, metadata = self._content()
        return identity(tensors, {"format": self.FORMAT, **metadata})

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with the metadata of `SCHEMA`."""
        tensors, metadata = self._content()
        require_metadata(path, metadata, self.SCHEMA)
        write_safetensors(path, self.FORMAT, tensors, metadata)

    def check_made_for(self, model: Model, what: object, *, any_weights: bool) -> None:
        """Raise unless it was made on a model of the same name, weights and dtype as `model`.

        Args:
            what: the path of the file, for the message.
            any_weights: check the name only.
        """
        name, expected = self.model_name, name_of(model)
        require(name == expected, f"{what} was made for {name}, the model is {expected}.")
        if any_weights:
            return
        accept = "any_weights=True accepts it"
        require(
            self.weights is not None and self.dtype is not None,
            f"{what} has no hash or dtype of the weights of {name} it was made on; {accept}.",
        )
        dtype = dtype_of(model)
        require(
            self.dtype == dtype,
            f"{what} was made on {name} in {self.dtype}, the model is in {dtype}; {accept}.",
        )
        weights = weights_hash(model)
        require(
            self.weights == weights,
            f"{what} was made on weights of {name} with the hash {str(self.weights)[:12]}, the "
            f"model's have {weights[:12]}; {accept}.",
        )
