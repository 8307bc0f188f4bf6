"""Adding a direction to the residual stream, at one dose or at one per row."""

from collections.abc import Mapping
from functools import partial

import torch
from einops import rearrange
from torch import Tensor
from transformer_lens import HookedTransformer

from shl.errors import check
from shl.hooks import Handle, row_values
from shl.shapes import Direction, Float
from shl.sites import check_layers, residual_after


class Steering(Handle):
    """Adds `dose * v` to the residual stream after each layer of the vector.

    A context manager and a handle with `.remove()`. `dose` is a number, or one per row of the
    batch; under `generate` rows mean the prompts of the call.
    """

    def __init__(
        self,
        model: HookedTransformer,
        directions: Mapping[int, Direction],
        dose: float | Float[Tensor, " batch"],
    ) -> None:
        check_directions(model, directions)
        finite = torch.isfinite(torch.as_tensor(dose)).all()
        check(bool(finite), f"dose is {dose!r}, it must be finite.")
        super().__init__(model)
        self.dose = dose
        for layer, v in directions.items():
            module = residual_after(model, layer)
            self._add(module, partial(self._steer, v.to(model.W_U.device)))

    @property
    def per_row(self) -> bool:
        """Whether each row has a dose of its own."""
        return isinstance(self.dose, Tensor)

    def _steer(self, v: Tensor, h: Tensor) -> Tensor | None:
        if isinstance(self.dose, Tensor):
            dose = row_values(self.dose.to(h.device), len(h))
            return h + (rearrange(dose, "batch -> batch 1 1") * v).to(h.dtype)
        # No arithmetic at dose 0: the identity is exact, signed zeros included.
        return h + (self.dose * v).to(h.dtype) if self.dose != 0 else None


def check_directions(model: HookedTransformer, directions: Mapping[int, Direction]) -> None:
    """Raise unless the model has every layer, at the width of its direction."""
    check_layers(model, list(directions))
    for layer, v in directions.items():
        check(
            v.shape == (model.cfg.d_model,),
            f"the vector of layer {layer} has shape {tuple(v.shape)}, {model.cfg.model_name} "
            f"has d_model {model.cfg.d_model}.",
        )
