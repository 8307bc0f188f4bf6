"""A recorder of activations at HookPoints while a model runs."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from shl.hooks.handle import Handle
from shl.hooks.positions import Positions, Scope, caller_rows, track_positions
from shl.utils.errors import require
from shl.utils.model import Model
from shl.utils.shapes import Bool


class Recorder(Handle):
    """Stores a clone of every tensor at the named HookPoints, in order, while it is active.

    During `generate` the first tensor of each name is the prompt's, the others have one position
    each. Clones are ordinary tensors that can be used in autograd.

    Args:
        mask, positions: the tokens to store, as in `shl.hooks.positions.Scope`. With either, they
            are stored as `[tok, ...]`, and `where[name]` has the row and absolute position of each,
            `[tok, 2]`; without, tensors are stored whole.

    Raises:
        ShlError: the model does not have a name, or a name is outside the blocks while `mask` or
            `positions` is given.

    Example:
        >>> from shl.models.generate import generate
        >>> from shl.models.tiny import tiny_gemma
        >>> model, name = tiny_gemma(), "blocks.1.hook_resid_post"
        >>> two = Recorder(model, [name], positions=[2, 13])
        >>> with Recorder(model, [name]) as whole, two:
        ...     texts = generate(model, ["Hello?"], max_new_tokens=3, min_new_tokens=3)
        >>> [x.shape[1] for x in whole.seen[name]]
        [13, 1, 1]
        >>> [x.tolist() for x in two.where[name]]
        [[[0, 2]], [[0, 13]], []]
    """

    def __init__(
        self,
        model: Model,
        names: Iterable[str],
        *,
        mask: Bool[Tensor, "batch pos"] | None = None,
        positions: Positions | None = None,
    ) -> None:
        names = tuple(names)
        for name in names:
            require(
                name in model.hook_dict,
                f"{name!r} is not a HookPoint of {model.cfg.model_name}; an example is "
                "'blocks.0.hook_resid_post'.",
            )
        self.scope = Scope(model, mask=mask, positions=positions)
        layers = {} if self.scope.plain else {name: _layer(name) for name in names}
        super().__init__(model)
        self.per_row, self.rows = not self.scope.plain, self.scope.rows
        self.seen: dict[str, list[Tensor]] = {name: [] for name in names}
        self.where: dict[str, list[Tensor]] = {name: [] for name in names}
        self._at: dict[int, Tensor] = {}
        track_positions(self, layers.values(), self._at.__setitem__)
        for name in names:
            store = partial(self._store_selected, layers[name]) if layers else self._store
            point = model.hook_dict[name]
            self.add_hook(point, partial(_as_for_hooks, point, partial(store, name)))

    def _store(self, name: str, x: Tensor) -> None:
        # A tensor cloned in inference mode could not be used in autograd.
        with torch.inference_mode(False):
            self.seen[name].append(x.detach().clone())

    def _store_selected(self, layer: int, name: str, x: Tensor) -> None:
        at = self._at[layer]
        require(
            x.shape[:2] == at.shape,
            f"{name!r} has shape {tuple(x.shape)}, its first axes must be batch and position.",
        )
        selected = self.scope.factor(at)[:, :, 0] > 0
        rows = caller_rows(len(at)).to(at.device)
        row_of = rearrange(rows, "batch -> batch 1").expand(at.shape)
        self._store(name, x[selected])
        self.where[name].append(torch.stack([row_of[selected], at[selected]], 1).cpu())


def _as_for_hooks(point: Any, store: Callable[[Tensor], None], x: Tensor) -> None:
    """Store `x` in the shape that TransformerLens's own hooks get: a bridge splits heads."""
    conversion = point.hook_conversion
    store(x if conversion is None else conversion.convert(x))


def _layer(name: str) -> int:
    parts = name.split(".")
    require(
        parts[0] == "blocks",
        f"{name!r} is outside the blocks, where positions are unknown; record it without mask and "
        "positions.",
    )
    return int(parts[1])
