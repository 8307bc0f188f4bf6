"""Steering: a direction added to the residual stream, with a dose per call, row or token."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from shl.hooks.handle import Handle, row_values
from shl.hooks.positions import Applied, Dose, Positions, Scope, caller_rows, track_positions
from shl.hooks.sites import check_layers, device_of, residual_after
from shl.utils.errors import require
from shl.utils.model import Model
from shl.utils.shapes import Bool, Direction, Float, Resid

Gate = Literal["cosine"]


class Steering(Handle):
    """Adds `factor * v` to the residual stream h after each layer of the vector.

    The factor of a token is that of `shl.hooks.positions.Scope` (dose, `mask`, `positions` and
    `half_life`). `gate="cosine"` multiplies it by 1 - max(0, cos(h, sign(dose) v)), so a token
    whose residual already points along the steered direction gets less. h includes the updates of
    handles that were added earlier.

    In `generate` the rows of `dose` and `mask` are the prompts of the call.

    Attributes:
        factors: with `record=True`, the factors of each forward by layer, in order (see
            `applied`); otherwise empty.
    """

    def __init__(
        self,
        model: Model,
        directions: Mapping[int, Direction],
        dose: Dose,
        *,
        mask: Bool[Tensor, "batch pos"] | None = None,
        positions: Positions | None = None,
        gate: Gate | None = None,
        half_life: float | None = None,
        record: bool = False,
    ) -> None:
        check_directions(model, directions)
        require(gate in (None, "cosine"), f"gate is {gate!r}, it must be None or 'cosine'.")
        self.scope = Scope(model, dose, mask=mask, positions=positions, half_life=half_life)
        super().__init__(model)
        # Recorded factors are stored for each row.
        self.per_row, self.rows = self.scope.per_row or record, self.scope.rows
        self.dose, self.gate, self.record = dose, gate, record
        self.factors: dict[int, list[Applied]] = {layer: [] for layer in directions}
        self._at: dict[int, Tensor] = {}  # positions of the tokens in a layer; empty if not needed
        if self._by_token:
            track_positions(self, directions, self._at.__setitem__)
        for layer, v in directions.items():
            v = v.to(device_of(model, layer))
            self.add_hook(residual_after(model, layer), partial(self._steer, layer, v))

    @property
    def _by_token(self) -> bool:
        """Whether tokens of a row may have different factors, or factors are recorded."""
        return self.gate is not None or self.record or self.scope.by_position

    @contextmanager
    def dosed(self, dose: Float[Tensor, " batch"] | Float[Tensor, "batch pos"]) -> Iterator[None]:
        """Replace the dose inside the body; the tensor is read at each forward, so that its values
        may be changed in place.

        Example:
            >>> from shl.models.tiny import tiny_gemma
            >>> model = tiny_gemma()
            >>> with Steering(model, {1: torch.ones(32)}, 2.0) as steering:
            ...     with steering.dosed(torch.tensor([0.0])):
            ...         off = model("Hello?")
            ...     steering.dose
            2.0
        """
        before, tracked = (self.dose, self.per_row, self.rows), self._by_token
        hooks = len(self._torch_handles)
        self.dose = self.scope.dose = dose
        self.per_row, self.rows = True, len(dose)
        if self._by_token and not tracked:
            track_positions(self, self.factors, self._at.__setitem__)
        try:
            yield
        finally:
            for handle in self._torch_handles[hooks:]:
                handle.remove()
            del self._torch_handles[hooks:]
            self._at.clear()
            self.dose, self.per_row, self.rows = before
            self.scope.dose = self.dose

    def applied(self, layer: int, row: int = 0) -> Float[Tensor, " pos"]:
        """The factor applied to each token of the caller's row after `layer`, by absolute position.

        A position that was run several times has the latest factor, one that was not run has NaN.

        Raises:
            ShlError: nothing was recorded for the layer and row.

        Example:
            >>> from shl.models.tiny import tiny_gemma
            >>> model = tiny_gemma()
            >>> steering = Steering(model, {1: torch.ones(32)}, 2.0, positions=[1], record=True)
            >>> with steering:
            ...     logits = model(torch.tensor([[2, 5, 6]]))
            >>> steering.applied(1)
            tensor([0., 2., 0.])
        """
        require(
            layer in self.factors,
            f"layer {layer} is not steered, the steered layers are {[*self.factors]}.",
        )
        latest: dict[int, float] = {}
        for forward in self.factors[layer]:
            for i in (forward.rows == row).nonzero()[:, 0].tolist():
                pairs = zip(forward.positions[i].tolist(), forward.factors[i].tolist(), strict=True)
                latest.update((at, x) for at, x in pairs if at >= 0)
        require(len(latest) > 0, f"nothing was recorded of row {row} at layer {layer}.")
        out = torch.full((max(latest) + 1,), torch.nan)
        out[list(latest)] = torch.tensor(list(latest.values()))
        return out

    def _steer(self, layer: int, v: Tensor, h: Tensor) -> Tensor | None:
        if layer in self._at:
            return self._steer_tokens(layer, v, h)
        if isinstance(self.dose, Tensor):
            dose = row_values(self.dose.to(h.device), len(h))
            return h + (rearrange(dose, "batch -> batch 1 1") * v).to(h.dtype)
        # Adding zeros would change the sign of negative zeros, so dose 0 returns None.
        return h + (self.dose * v).to(h.dtype) if self.dose != 0 else None

    def _steer_tokens(self, layer: int, v: Tensor, h: Resid) -> Resid:
        at = self._at.pop(layer)
        factor = self.scope.factor(at)
        if self.gate == "cosine":
            factor = factor * openness(h, v, factor)
        if self.record:
            recorded = rearrange(factor, "batch pos 1 -> batch pos").detach().clone().cpu()
            self.factors[layer].append(Applied(caller_rows(len(at)), at.clone().cpu(), recorded))
        return h + (factor * v).to(h.dtype)


def openness(
    h: Resid, v: Direction, dose: Float[Tensor, "batch pos 1"]
) -> Float[Tensor, "batch pos 1"]:
    """1 - max(0, cos(h, sign(dose) v)) per token, in fp32.

    It is 1 if h is orthogonal to the steered direction or points away from it, 0 if h is parallel.

    Example:
        >>> h = torch.tensor([[[3.0, 4.0], [0.0, 1.0], [-1.0, 0.0]]])
        >>> openness(h, torch.tensor([2.0, 0.0]), torch.ones(1, 3, 1))[0, :, 0]
        tensor([0.4000, 1.0000, 1.0000])
    """
    cosine = torch.cosine_similarity(h.float(), v.float(), dim=-1)
    signed = rearrange(cosine, "batch pos -> batch pos 1") * dose.sign()
    return 1 - signed.clamp(0, 1)


def check_directions(model: Model, directions: Mapping[int, Direction]) -> None:
    """Raise unless the model has every layer, and every direction has its width."""
    check_layers(model, list(directions))
    for layer, v in directions.items():
        require(
            v.shape == (model.cfg.d_model,),
            f"the vector of layer {layer} has shape {tuple(v.shape)}, {model.cfg.model_name} "
            f"has d_model {model.cfg.d_model}.",
        )
