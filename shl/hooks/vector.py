"""Steering vectors as objects: apply, add, scale, project, save and load."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from shl.hooks.adapter import common_value
from shl.hooks.fingerprint import check_made_for
from shl.hooks.positions import Positions
from shl.hooks.steering import Gate, Steering, check_directions
from shl.utils.errors import require
from shl.utils.files import (
    MADE_ON,
    NONE,
    Schema,
    identity,
    read_safetensors,
    require_metadata,
    write_safetensors,
)
from shl.utils.shapes import Bool, Direction, Float

SCHEMA: Schema = {
    **MADE_ON,
    "axis": (str,),
    "contexts": (int,),
    "rule": (str, NONE),
    "token": (str, NONE),
    "hooks": (list,),
}
"""The metadata of format `shl-vector-3`, beside `format` and `identity`: extraction rule and
token, and the hook of each tensor."""


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
        require(
            own and key == hook_of(int(name[1])),
            f"{what} holds {key!r}, a vector's keys are blocks.LAYER.hook_resid_post.",
        )
        shape = tuple(v.shape)
        require(len(shape) == 1, f"{key} in {what} has shape {shape}, it must be (d_model,).")
        layers[int(name[1])] = v
    require(len(layers) > 0, f"{what} holds no direction.")
    hooks = [hook_of(layer) for layer in sorted(layers)]
    require(
        meta["hooks"] == hooks,
        f"{what} says hooks = {short(meta['hooks'])}, by its tensors that is {short(hooks)}.",
    )
    return dict(sorted(layers.items()))


FORMAT = "shl-vector-3"


@dataclass(frozen=True)
class SteeringVector:
    """One direction `[d_model]` per layer of the band, keyed by layer index.

    `model_name`, `weights` (its `weights_hash`) and `dtype` tell on which base it was made,
    `rule` and `token` how it was read, `round` where in a loop; None where not known.

    Example:
        >>> import torch
        >>> v = SteeringVector({1: torch.tensor([3.0, 4.0])}, "tiny", "demo", 8)
        >>> v.norms()
        {1: 5.0}
    """

    directions: Mapping[int, Direction]
    model_name: str
    axis: str
    contexts: int
    weights: str | None = None
    dtype: str | None = None
    rule: str | None = None
    token: str | None = None
    round: int | None = None

    def steering(
        self,
        model: HookedTransformer,
        dose: float | Float[Tensor, " batch"] = 1.0,
        *,
        mask: Bool[Tensor, "batch pos"] | None = None,
        positions: Positions | None = None,
        gate: Gate | None = None,
        half_life: float | None = None,
        record: bool = False,
    ) -> Steering:
        """Steer `model` until the returned context manager ends or its `.remove()` is called;
        `model.reset_hooks()` does not take it off.

        Args:
            dose: times v is added; a number, or one per row of the batch.
            mask: True where to steer, by row and absolute position in the row's own tokens;
                positions beyond its width are not steered.
            positions: which absolute positions to steer, in every row: a range, numbers from 0,
                or a slice such as `slice(20, None)`.
            gate: "cosine" gives each token dose * (1 - max(0, cos(h, sign(dose) v))), less the
                further its residual h points along the vector already.
            half_life: completion tokens after which the dose has halved; the prompt, assistant
                tag included, has the full dose.
            record: keep what each token got, for `.applied(layer, row)`.

        Raises:
            ShlError: a layer or width that the model does not have, or an option out of range.

        Example:
            >>> import torch
            >>> from shl.models.tiny import tiny_gemma
            >>> model, v = tiny_gemma(), SteeringVector({1: torch.ones(32)}, "tiny", "demo", 1)
            >>> with v.steering(model, 0.5, positions=slice(2, None)) as steering:
            ...     logits = model("only from the third token on")
        """
        return Steering(
            model,
            self.directions,
            dose,
            mask=mask,
            positions=positions,
            gate=gate,
            half_life=half_life,
            record=record,
        )

    def __add__(self, other: "SteeringVector") -> "SteeringVector":
        """Both at once, in one hook per layer; layers that only one has stay as they are.

        Raises:
            ShlError: vectors of different models.
        """
        self._same_model(other)
        layers = sorted({*self.directions, *other.directions})
        sums = {
            layer: torch.stack(
                [v.directions[layer] for v in (self, other) if layer in v.directions]
            ).sum(0)
            for layer in layers
        }
        metadata = {
            key: common_value([getattr(self, key), getattr(other, key)])
            for key in ("weights", "dtype", "rule", "token", "round")
        }
        contexts = min(self.contexts, other.contexts)
        both = f"{self.axis} + {other.axis}"
        return SteeringVector(sums, self.model_name, both, contexts, **metadata)

    def __mul__(self, factor: float) -> "SteeringVector":
        """Every direction times a number."""
        scaled = {layer: v * factor for layer, v in self.directions.items()}
        return replace(self, directions=scaled, axis=f"{factor:g} * ({self.axis})")

    __rmul__ = __mul__

    def project_out(self, other: "SteeringVector") -> "SteeringVector":
        """What is left of each direction at right angles to `other`'s, on the layers of both.

        Raises:
            ShlError: vectors of different models, no shared layer, or a direction of `other`
                that is zero.

        Example:
            >>> import torch
            >>> a = SteeringVector({1: torch.tensor([3.0, 4.0])}, "tiny", "a", 8)
            >>> b = SteeringVector({1: torch.tensor([0.0, 2.0])}, "tiny", "b", 8)
            >>> a.project_out(b).directions[1]
            tensor([3., 0.])
        """
        self._same_model(other)
        shared = self.cosine(other)
        left = dict(self.directions)
        for layer in shared:
            along = other.directions[layer]
            require(float(along.norm()) > 0, f"the direction of layer {layer} to project out is 0.")
            unit = along / along.norm()
            left[layer] = left[layer] - (left[layer] @ unit) * unit
        return replace(self, directions=left, axis=f"{self.axis} without {other.axis}")

    def _same_model(self, other: "SteeringVector") -> None:
        require(
            self.model_name == other.model_name,
            f"the vectors were made on {self.model_name} and {other.model_name}, they must share "
            "a model.",
        )

    def norms(self) -> dict[int, float]:
        """2-norm of each layer's direction."""
        return {layer: float(v.norm()) for layer, v in self.directions.items()}

    def cosine(self, other: "SteeringVector") -> dict[int, float]:
        """Cosine to another vector, per layer that both have.

        Raises:
            ShlError: they share no layer.
        """
        shared = [layer for layer in self.directions if layer in other.directions]
        require(
            len(shared) > 0,
            f"vectors of layers {list(self.directions)} and {list(other.directions)} share none.",
        )
        return {
            layer: float(
                torch.cosine_similarity(self.directions[layer], other.directions[layer], dim=0)
            )
            for layer in shared
        }

    def identity(self) -> str:
        """What `save` writes as identity: SHA-256 of numbers and metadata, no path, no time."""
        tensors, metadata = self._content()
        return identity(tensors, {"format": FORMAT, **metadata})

    def save(self, path: str | Path) -> None:
        """Write safetensors; `shl.hooks.vector.SCHEMA` lists what its metadata says."""
        tensors, metadata = self._content()
        require_metadata(path, metadata, SCHEMA)
        write_safetensors(path, FORMAT, tensors, metadata)

    def _content(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        tensors = {hook_of(layer): v for layer, v in sorted(self.directions.items())}
        metadata = {key: getattr(self, key) for key in SCHEMA if key not in ("model", "hooks")}
        return tensors, {"model": self.model_name, "hooks": list(tensors), **metadata}

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: HookedTransformer | None = None,
        *,
        any_weights: bool = False,
    ) -> "SteeringVector":
        """Read what `save` wrote; with a model, check that it was made for it.

        Args:
            any_weights: take a vector that was made on other weights (a fine-tune, another
                dtype) of a model of this name and width.

        Raises:
            ShlError: the file is missing, damaged, changed, or not one of ours; or it was made
                on another model, other weights, another dtype, layers or width; the sentence
                names the first difference.
        """
        meta, tensors = read_safetensors(path, FORMAT, SCHEMA)
        layers = read_directions(path, meta, tensors)
        metadata = {key: value for key, value in meta.items() if key not in ("model", "hooks")}
        vector = cls(layers, meta["model"], **metadata)
        if model is not None:
            check_made_for(
                model,
                str(path),
                vector.model_name,
                vector.weights,
                vector.dtype,
                any_weights=any_weights,
            )
            check_directions(model, vector.directions)
        return vector
