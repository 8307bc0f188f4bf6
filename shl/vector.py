"""Steering vectors: extract, save, load, apply.

`v = mean(h+ - h-)` per layer, where h is the residual stream at the assistant tag (the last
prompt token) under the positive and the negative persona: contrastive activation addition,
Panickssery et al. 2023, arXiv:2312.06681. Raw, not normalised.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from reprlib import repr as short

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from shl.activations import residual_at_tag
from shl.adapter_meta import shared
from shl.axes import Axis
from shl.errors import check
from shl.files import Kinds, check_told, identity, read_safetensors, write_safetensors
from shl.fingerprint import check_made_for, dtype_of, name_of, weights_hash
from shl.rules import Rule, mean_difference, rule_name
from shl.shapes import Direction
from shl.sites import band
from shl.steering import Steering, check_directions
from shl.tokens import Prompt

FORMAT = "shl-vector-3"
TOKEN = "last prompt token"
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


@dataclass(frozen=True)
class SteeringVector:
    """One direction `[d_model]` per layer of the band, keyed by layer index.

    `model_name`, `weights` (`shl.fingerprint.weights_hash`) and `dtype` tell on which base it was
    made, `rule` and `token` how it was read, `round` where in a loop; None where not known.

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
        told = {
            key: shared([getattr(self, key), getattr(other, key)])
            for key in ("weights", "dtype", "rule", "token", "round")
        }
        contexts = min(self.contexts, other.contexts)
        both = f"{self.axis} + {other.axis}"
        return SteeringVector(sums, self.model_name, both, contexts, **told)

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

    def identity(self) -> str:
        """What `save` writes as identity: SHA-256 of numbers and metadata, no path, no time."""
        tensors, told = self._content()
        return identity(tensors, {"format": FORMAT, **told})

    def save(self, path: str | Path) -> None:
        """Write safetensors; `shl.vector.KINDS` lists what its metadata says."""
        tensors, told = self._content()
        check_told(path, told, KINDS)
        write_safetensors(path, FORMAT, tensors, told)

    def _content(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        tensors = {_key(layer): v for layer, v in sorted(self.directions.items())}
        told = {key: getattr(self, key) for key in KINDS if key not in ("model", "hooks")}
        return tensors, {"model": self.model_name, "hooks": list(tensors), **told}

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
        meta, tensors = read_safetensors(path, FORMAT, KINDS)
        layers: dict[int, Tensor] = {}
        for key, v in tensors.items():
            name = key.split(".")
            own = len(name) == 3 and name[1].isdecimal() and len(name[1]) < 10
            check(
                own and key == _key(int(name[1])),
                f"{path} holds {key!r}, a vector's keys are blocks.LAYER.hook_resid_post.",
            )
            check(
                v.ndim == 1, f"{key} in {path} has shape {tuple(v.shape)}, it must be (d_model,)."
            )
            layers[int(name[1])] = v
        check(len(layers) > 0, f"{path} holds no direction.")
        hooks = [_key(layer) for layer in sorted(layers)]
        check(
            meta["hooks"] == hooks,
            f"{path} says hooks = {short(meta['hooks'])}, by its tensors that is {short(hooks)}.",
        )
        told = {key: value for key, value in meta.items() if key not in ("model", "hooks")}
        vector = cls(dict(sorted(layers.items())), meta["model"], **told)
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
    round: int | None = None,
) -> SteeringVector:
    """The axis's steering vector on the model as it stands, hooks included.

    Args:
        layers: the band; None is the middle third.
        contexts: how many of the axis's contexts are used, from the first; None is all.
        rule: `(positive, negative) -> direction`, each `[n, d_model]`, row i of both from
            context i.
        round: where in a loop it is taken, for its file.

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
    return SteeringVector(
        directions,
        name_of(model),
        axis.name,
        contexts,
        weights_hash(model),
        dtype_of(model),
        rule_name(rule),
        TOKEN,
        round,
    )
