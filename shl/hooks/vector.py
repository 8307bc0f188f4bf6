"""Steering vectors: apply, add, scale, project, save and load."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from reprlib import repr as short
from typing import Any, ClassVar

import torch
from torch import Tensor

from shl.hooks.adapter import common_value
from shl.hooks.fingerprint import Stored
from shl.hooks.positions import Dose, Positions
from shl.hooks.steering import Gate, Steering, check_directions
from shl.utils.errors import ShlError, require
from shl.utils.files import MADE_ON, NONE, Schema, read_safetensors
from shl.utils.model import Model
from shl.utils.shapes import Bool, Direction


def hook_of(layer: int | str) -> str:
    """The HookPoint after a layer, the key of its direction in a file."""
    return f"blocks.{layer}.hook_resid_post"


def read_directions(
    what: object, hooks: object, tensors: Mapping[str, Tensor]
) -> dict[int, Direction]:
    """The directions in a file by layer, in order.

    Raises:
        ShlError: there is no direction, a key is not a HookPoint after a layer, a shape is not
            `[d_model]`, or the hooks differ from the metadata's `hooks`.
    """
    layers: dict[int, Tensor] = {}
    for key, v in tensors.items():
        match = re.fullmatch(r"blocks\.(0|[1-9][0-9]{0,8})\.hook_resid_post", key)
        if match is None:
            raise ShlError(f"{what} has the key {key!r}, a vector's keys are {hook_of('LAYER')}.")
        shape = tuple(v.shape)
        require(len(shape) == 1, f"{key} in {what} has shape {shape}, it must be (d_model,).")
        layers[int(match[1])] = v
    require(len(layers) > 0, f"{what} has no direction.")
    expected = [hook_of(layer) for layer in sorted(layers)]
    require(
        hooks == expected, f"{what} has hooks = {short(hooks)}, its tensors give {short(expected)}."
    )
    return dict(sorted(layers.items()))


@dataclass(frozen=True)
class SteeringVector(Stored):
    """One direction `[d_model]` per layer, keyed by layer index.

    `model_name`, `weights` (its `weights_hash`) and `dtype` identify the base model, `rule` and
    `token` the extraction, `round` the round of the loop; None if unknown.

    Example:
        >>> import torch
        >>> v = SteeringVector({1: torch.tensor([3.0, 4.0])}, "tiny", "demo", 8)
        >>> v.norms()
        {1: 5.0}
    """

    FORMAT: ClassVar[str] = "shl-vector-3"
    SCHEMA: ClassVar[Schema] = {
        **MADE_ON,
        "axis": (str,),
        "contexts": (int,),
        "rule": (str, NONE),
        "token": (str, NONE),
        "hooks": (list,),
    }
    """The metadata of a file, in addition to `format` and `identity`: `rule` and `token` of the
    extraction, and `hooks`, the hook of each tensor."""

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
        model: Model,
        dose: Dose = 1.0,
        *,
        mask: Bool[Tensor, "batch pos"] | None = None,
        positions: Positions | None = None,
        gate: Gate | None = None,
        half_life: float | None = None,
        record: bool = False,
    ) -> Steering:
        """Steer `model` until the returned context manager ends or its `.remove()` is called.

        Args:
            dose, mask, positions, half_life: factor of v for each token, as in
                `shl.hooks.positions.Scope`.
            gate: "cosine" multiplies the dose by 1 - max(0, cos(h, sign(dose) v)), where h is the
                token's residual.
            record: store the factor of each token, for `.applied(layer, row)`.

        Raises:
            ShlError: the model does not have a layer or width, or an option is out of range.

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
        """The sum of two vectors; layers of only one of them stay unchanged.

        Raises:
            ShlError: the vectors belong to different models.
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

    def project_out(self, *others: "SteeringVector") -> "SteeringVector":
        """The component of each direction orthogonal to the span of the others' at its layer.

        Raises:
            ShlError: no other vector, the vectors belong to different models or share no layer, or
                a direction of another is zero.

        Example:
            >>> import torch
            >>> a = SteeringVector({1: torch.tensor([3.0, 4.0])}, "tiny", "a", 8)
            >>> b = SteeringVector({1: torch.tensor([0.0, 2.0])}, "tiny", "b", 8)
            >>> a.project_out(b).directions[1]
            tensor([3., 0.])
        """
        require(len(others) > 0, "project_out got no vector, give at least one.")
        for other in others:
            self._same_model(other)
            self.cosine(other)
        out = dict(self.directions)
        for layer, v in out.items():
            units = []
            for other in (o for o in others if layer in o.directions):
                along = other.directions[layer].double()
                require(
                    float(along.norm()) > 0,
                    f"the direction of {other.axis} at layer {layer} is 0, it cannot be projected "
                    "out.",
                )
                units.append(along / along.norm())
            if units:
                # Directions that depend on the others add no singular value of their own.
                _, sizes, rows = torch.linalg.svd(torch.stack(units), full_matrices=False)
                basis = rows[sizes > 1e-6]
                out[layer] = (v.double() - (v.double() @ basis.T) @ basis).to(v)
        names = ", ".join(other.axis for other in others)
        return replace(self, directions=out, axis=f"{self.axis} without {names}")

    def _same_model(self, other: "SteeringVector") -> None:
        require(
            self.model_name == other.model_name,
            f"the vectors were made on {self.model_name} and {other.model_name}, the model must "
            "be the same.",
        )

    def norms(self) -> dict[int, float]:
        """2-norm of each layer's direction."""
        return {layer: float(v.norm()) for layer, v in self.directions.items()}

    def cosine(self, other: "SteeringVector") -> dict[int, float]:
        """Cosine similarity to another vector at each shared layer.

        Raises:
            ShlError: they share no layer.
        """
        shared = [layer for layer in self.directions if layer in other.directions]
        require(
            len(shared) > 0,
            f"vectors of layers {list(self.directions)} and {list(other.directions)} share none.",
        )
        pairs = {layer: (self.directions[layer], other.directions[layer]) for layer in shared}
        return {at: float(torch.cosine_similarity(a, b, dim=0)) for at, (a, b) in pairs.items()}

    def _content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {hook_of(layer): v for layer, v in sorted(self.directions.items())}
        metadata = {key: getattr(self, key) for key in self.SCHEMA if key not in ("model", "hooks")}
        return tensors, {"model": self.model_name, "hooks": list(tensors), **metadata}

    @classmethod
    def load(
        cls, path: str | Path, model: Model | None = None, *, any_weights: bool = False
    ) -> "SteeringVector":
        """Read a file written by `save`; with a model, check that the vector was made for it.

        Args:
            any_weights: accept a vector made on other weights (a fine-tune, another dtype) of a
                model with the same name and width.

        Raises:
            ShlError: the file is missing, damaged, modified or of another format, or the vector was
                made for another model, other weights, another dtype, layers or width; the message
                names the first difference.
        """
        meta, tensors = read_safetensors(path, cls.FORMAT, cls.SCHEMA)
        directions = read_directions(path, meta.pop("hooks"), tensors)
        vector = cls(directions, meta.pop("model"), **meta)
        if model is not None:
            vector.check_made_for(model, path, any_weights=any_weights)
            check_directions(model, vector.directions)
        return vector
