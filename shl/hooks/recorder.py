"""Recording what passes HookPoints while a model runs."""

from collections.abc import Iterable
from functools import partial

import torch
from einops import rearrange
from torch import Tensor
from transformer_lens import HookedTransformer

from shl.hooks.handle import Handle
from shl.hooks.positions import Positions, Scope, caller_rows, track_positions
from shl.utils.errors import require
from shl.utils.shapes import Bool


class Recorder(Handle):
    """Keeps a clone of every tensor that passes the named HookPoints, in order, while it is on.

    A context manager and a handle; `model.reset_hooks()` leaves it on. Under `generate` the first
    tensor of each name is the prompt's, the others are one position long. Clones are ordinary
    tensors that may enter autograd.

    With `mask` or `positions` only the tokens that they name are kept, as `[tok, ...]`, and
    `where[name]` tells for each its row and absolute position, `[tok, 2]`.

    Args:
        mask: True where to keep, by row and absolute position in the row's own tokens; nothing is
            kept beyond its width.
        positions: which absolute positions to keep, in every row: a range, numbers from 0, or a
            slice.

    Raises:
        ShlError: a name that the model does not have, or, to choose positions, one outside the
            blocks.

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
        model: HookedTransformer,
        names: Iterable[str],
        *,
        mask: Bool[Tensor, "batch pos"] | None = None,
        positions: Positions | None = None,
    ) -> None:
        names = tuple(names)
        for name in names:
            require(
                name in model.hook_dict,
                f"{name!r} is no HookPoint of {model.cfg.model_name}, one is "
                "'blocks.0.hook_resid_post'.",
            )
        self.scope = Scope(model, mask=mask, positions=positions)
        layers = {} if self.scope.plain else {name: _layer(name) for name in names}
        super().__init__(model)
        self.seen: dict[str, list[Tensor]] = {name: [] for name in names}
        self.where: dict[str, list[Tensor]] = {name: [] for name in names}
        self._at: dict[int, Tensor] = {}
        track_positions(self, layers.values(), self._at.__setitem__)
        for name in names:
            keep = partial(self._choose, layers[name]) if layers else self._keep
            self.add_hook(model.hook_dict[name], partial(keep, name))

    @property
    def per_row(self) -> bool:
        """Whether it chooses tokens, which every row must bring itself."""
        return not self.scope.plain

    @property
    def rows(self) -> int | None:
        """How many rows the mask has, None without one."""
        return self.scope.rows

    def _keep(self, name: str, x: Tensor) -> None:
        # Not `detach().clone()` alone: a tensor made in inference mode could never enter autograd.
        with torch.inference_mode(False):
            self.seen[name].append(x.detach().clone())

    def _choose(self, layer: int, name: str, x: Tensor) -> None:
        at = self._at[layer]
        require(x.shape[:2] == at.shape, f"{name!r} has no axes of batch and position first.")
        chosen = self.scope.factor(at)[:, :, 0] > 0
        rows = caller_rows(len(at)).to(at.device)
        own = rearrange(rows, "batch -> batch 1").expand(at.shape)
        self._keep(name, x[chosen])
        self.where[name].append(torch.stack([own[chosen], at[chosen]], 1).cpu())


def _layer(name: str) -> int:
    parts = name.split(".")
    require(
        parts[0] == "blocks",
        f"{name!r} is outside the blocks, where positions are not known; record it whole.",
    )
    return int(parts[1])
