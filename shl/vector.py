"""Steering vectors: extract, save, load, apply.

`v = mean(h+ - h-)` per layer, where h is the residual stream at the assistant tag (the last
prompt token) under the positive and the negative persona: contrastive activation addition,
Panickssery et al. 2023, arXiv:2312.06681. Raw, not normalised.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from shl.activations import residual_at_tag
from shl.axes import Axis
from shl.errors import check
from shl.files import read_safetensors, write_safetensors
from shl.shapes import Direction
from shl.sites import band
from shl.steering import Steering
from shl.tokens import Prompt

FORMAT = "shl-vector-2"
Rule = Callable[[Float[Tensor, "n d_model"], Float[Tensor, "n d_model"]], Direction]


def mean_difference(
    positive: Float[Tensor, "n d_model"], negative: Float[Tensor, "n d_model"]
) -> Direction:
    """The default extraction rule, `[n, d_model]` twice to `[d_model]`.

    Example:
        >>> import torch
        >>> mean_difference(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
        tensor([2., 0.])
    """
    return reduce(positive - negative, "n d_model -> d_model", "mean")


def first_component(
    positive: Float[Tensor, "n d_model"], negative: Float[Tensor, "n d_model"]
) -> Direction:
    """First principal component of the differences (uncentred), in the direction and at the size
    of their mean along it (Zou et al. 2023, arXiv:2310.01405, section 3.1).

    Example:
        >>> import torch
        >>> first_component(torch.tensor([[3.0, 0.0], [5.0, 0.0]]), torch.zeros(2, 2))
        tensor([4., 0.])
    """
    differences = positive - negative
    component = torch.linalg.svd(differences, full_matrices=False).Vh[0]
    return component * (differences @ component).mean()


@dataclass(frozen=True)
class SteeringVector:
    """One direction `[d_model]` per layer of the band, keyed by layer index.

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

    def steering(
        self, model: HookedTransformer, dose: float | Float[Tensor, " batch"] = 1.0
    ) -> Steering:
        """Steer `model` until the returned context manager ends or its `.remove()` is called.

        Raises:
            ShlError: a layer or width that the model does not have, or a dose that is not finite.
        """
        return Steering(model, self.directions, dose)

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
        contexts = min(self.contexts, other.contexts)
        return SteeringVector(sums, self.model_name, f"{self.axis} + {other.axis}", contexts)

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
            check(float(along.norm()) > 0, f"the direction of layer {layer} to project out is 0.")
            unit = along / along.norm()
            left[layer] = left[layer] - (left[layer] @ unit) * unit
        return replace(self, directions=left, axis=f"{self.axis} without {other.axis}")

    def _same_model(self, other: "SteeringVector") -> None:
        check(
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
        check(
            len(shared) > 0,
            f"vectors of layers {list(self.directions)} and {list(other.directions)} share none.",
        )
        return {
            layer: float(
                torch.cosine_similarity(self.directions[layer], other.directions[layer], dim=0)
            )
            for layer in shared
        }

    def save(self, path: str | Path) -> None:
        """Write safetensors with the model's name, axis and token rule in its metadata."""
        meta = {
            "model": self.model_name,
            "axis": self.axis,
            "contexts": self.contexts,
            "token": "last prompt token",
        }
        write_safetensors(path, FORMAT, {_key(i): v for i, v in self.directions.items()}, meta)

    @classmethod
    def load(cls, path: str | Path) -> "SteeringVector":
        """Read what `save` wrote.

        Raises:
            ShlError: the file is missing, damaged, or not one of ours.
        """
        meta, tensors = read_safetensors(path, FORMAT)
        layers = {}
        for key, v in tensors.items():
            name = key.split(".")
            check(
                len(name) == 3 and name[1].isdecimal() and key == _key(int(name[1])),
                f"{path} holds {key!r}, a vector's keys are blocks.LAYER.hook_resid_post.",
            )
            layers[int(name[1])] = v
        return cls(dict(sorted(layers.items())), meta["model"], meta["axis"], int(meta["contexts"]))


def _key(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_post"


def extract_vector(
    model: HookedTransformer,
    axis: Axis,
    layers: Sequence[int] | None = None,
    *,
    contexts: int | None = None,
    batch_size: int = 16,
    rule: Rule = mean_difference,
) -> SteeringVector:
    """The axis's steering vector on the model as it stands, hooks included.

    Args:
        layers: the band; None is the middle third.
        contexts: how many of the axis's contexts are used, from the first; None is all.
        rule: `(positive, negative) -> direction`, each `[n, d_model]`, row i of both from
            context i.

    Raises:
        ShlError: a layer out of range, more contexts than the axis has, or residuals that are
            not finite.

    Example:
        >>> from shl.axes import load_axis
        >>> from shl.tiny import tiny_gemma
        >>> v = extract_vector(tiny_gemma(), load_axis("love"), layers=[1], contexts=4)
        >>> v.directions[1].shape
        torch.Size([32])
    """
    layers = tuple(band(model, 1 / 3, 2 / 3) if layers is None else layers)
    contexts = len(axis.contexts) if contexts is None else contexts
    check(
        1 <= contexts <= len(axis.contexts),
        f"contexts is {contexts}, axis {axis.name!r} has {len(axis.contexts)}.",
    )
    sides = [
        residual_at_tag(
            model,
            [Prompt(context, persona) for context in axis.contexts[:contexts]],
            layers,
            batch_size=batch_size,
        )
        for persona in (axis.positive, axis.negative)
    ]
    directions = {}
    for layer in sorted(set(layers)):
        v = rule(sides[0][layer], sides[1][layer])
        check(bool(torch.isfinite(v).all()), f"the vector of layer {layer} is not finite.")
        directions[layer] = v
    return SteeringVector(directions, model.cfg.model_name, axis.name, contexts)
