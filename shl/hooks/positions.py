"""Dose, mask, positions and decay of a hook, combined into one factor per token.

Positions are absolute and do not count padding: a row's first token has position 0, and tokens
decoded with a cache continue from the cached ones.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from shl.hooks.handle import PROMPTS, ROWS, Handle, row_values
from shl.hooks.sites import block_of, device_of, token_positions
from shl.utils.errors import require
from shl.utils.model import Model
from shl.utils.shapes import Bool, Float, Int

Positions = Sequence[int] | slice
Dose = float | Float[Tensor, " batch"] | Float[Tensor, "batch pos"]


class Scope:
    """A dose and the tokens to which it applies.

    The factor of the token at absolute position p of row i is

        dose[i] * 0.5 ** (n / half_life) * mask[i, p] * (p in positions),

    where n = max(0, p - (prompt tokens of row i) + 1) counts completion tokens. `generate` and the
    scores declare the prompt lengths; in a plain `model(tokens)` all tokens are prompt, unless
    `shl.hooks.running(prompts=...)` is used.

    Args:
        dose: a number, or one per row, or `[batch, pos]` by absolute position, where positions
            beyond the last have its dose.
        mask: `[batch, pos]`, True where the hook acts; **it does not act on positions beyond the
            mask's width, such as generated tokens**. Rows are those of the dose.
        positions: positions on which the hook acts, the same in each row: a range, integers from
            0, or a slice such as `slice(20, None)`.
        half_life: number of completion tokens over which the dose halves; prompt tokens, the
            assistant tag included, have the full dose. None for no decay.

    Raises:
        ShlError: a value is not finite, the mask is not a boolean `[batch, pos]`, or the model
            does not have the positions.

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> scope = Scope(tiny_gemma(), 2.0, positions=[1, 3])
        >>> scope.factor(torch.arange(4)[None])[0, :, 0]
        tensor([0., 2., 0., 2.])
    """

    def __init__(
        self,
        model: Model,
        dose: Dose = 1.0,
        *,
        mask: Bool[Tensor, "batch pos"] | None = None,
        positions: Positions | None = None,
        half_life: float | None = None,
    ) -> None:
        finite = torch.isfinite(torch.as_tensor(dose)).all()
        require(bool(finite), f"dose is {dose!r}, it must be finite.")
        if isinstance(dose, Tensor):
            require(
                dose.ndim in (1, 2),
                f"dose has shape {tuple(dose.shape)}, it must be (batch,) or (batch, pos).",
            )
        if half_life is not None:
            fine = math.isfinite(half_life) and half_life > 0
            require(fine, f"half_life is {half_life!r}, it must be finite and above 0 tokens.")
        if mask is not None:
            shape = tuple(mask.shape)
            require(
                mask.dtype == torch.bool and mask.ndim == 2 and 0 < shape[1] <= model.cfg.n_ctx,
                f"mask has dtype {mask.dtype} and shape {shape}, it must be torch.bool and (batch, "
                f"pos) with 1 to {model.cfg.n_ctx} positions.",
            )
            doses = len(dose) if isinstance(dose, Tensor) else len(mask)
            require(
                doses == len(mask),
                f"{doses} per-row doses and a mask of {len(mask)} rows were given, the numbers "
                "must be equal.",
            )
        self.dose = dose
        self.mask = None if mask is None else mask.to(model.W_U.device)
        self.half_life = half_life
        self.allowed = None if positions is None else _allowed(model, positions)

    @property
    def plain(self) -> bool:
        """Whether every token has the same dose."""
        return not isinstance(self.dose, Tensor) and not self.by_position

    @property
    def whole(self) -> bool:
        """Whether every token has a dose of 1."""
        return self.plain and bool(self.dose == 1)

    @property
    def by_position(self) -> bool:
        """Whether the factor depends on the token's position."""
        by_token = isinstance(self.dose, Tensor) and self.dose.ndim == 2
        parts = (self.mask, self.allowed, self.half_life)
        return by_token or any(part is not None for part in parts)

    @property
    def per_row(self) -> bool:
        """Whether rows of a batch may differ at the same position."""
        return self.rows is not None or self.half_life is not None

    @property
    def rows(self) -> int | None:
        """Number of rows with per-row values; None if all rows are treated alike."""
        tensors = (x for x in (self.dose, self.mask) if isinstance(x, Tensor))
        return next((len(x) for x in tensors), None)

    def factor(self, at: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos 1"]:
        """The factor of each token, given absolute positions; 0 at padding (-1).

        Raises:
            ShlError: the number of doses, mask rows or prompt lengths differs from that of the
                rows.
        """
        batch, real = len(at), at >= 0
        if isinstance(self.dose, Tensor):
            dose = row_values(self.dose.to(at.device), batch)
            if dose.ndim == 1:
                out = rearrange(dose, "batch -> batch 1").expand(at.shape)
            else:
                out = dose.gather(1, at.clamp(0, dose.shape[1] - 1))
        else:
            out = torch.full(at.shape, float(self.dose), device=at.device)
        prompts = PROMPTS.get()
        if self.half_life is not None and prompts is not None:
            require(
                len(prompts) == batch,
                f"{len(prompts)} prompt lengths were given for a batch of {batch} rows.",
            )
            tag = rearrange(prompts.to(at.device) - 1, "batch -> batch 1")
            out = out * 0.5 ** ((at - tag).clamp(min=0) / self.half_life)
        if self.mask is not None:
            mask = row_values(self.mask.to(at.device), batch, "rows of a mask")
            width = mask.shape[1]
            real = real & (at < width) & mask.gather(1, at.clamp(0, width - 1))
        if self.allowed is not None:
            real = real & self.allowed.to(at.device)[at.clamp(min=0)]
        return rearrange(torch.where(real, out, 0.0), "batch pos -> batch pos 1")


def _allowed(model: Model, positions: Positions) -> Bool[Tensor, " pos"]:
    n_ctx = model.cfg.n_ctx
    if isinstance(positions, slice):
        ends = (positions.start, positions.stop, positions.step)
        good = all(x is None or (type(x) is int and x >= 0) for x in ends) and ends[2] != 0
        chosen = tuple(range(n_ctx)[positions]) if good else ()
    else:
        chosen = tuple(positions)
        good = all(type(p) is int and 0 <= p < n_ctx for p in chosen)
    require(
        good and len(chosen) > 0,
        f"positions is {positions!r}, it must have at least one of 0 to {n_ctx - 1}.",
    )
    out = torch.zeros(n_ctx, dtype=torch.bool, device=model.W_U.device)
    out[list(chosen)] = True
    return out


@dataclass(frozen=True)
class Applied:
    """The factors of one forward: the caller's `rows` `[batch]`, absolute `positions` and
    `factors`, both `[batch, pos]`; padding has position -1."""

    rows: Tensor
    positions: Tensor
    factors: Tensor


def caller_rows(batch: int) -> Int[Tensor, " batch"]:
    """Indices of the current batch's rows in the caller's list."""
    rows = ROWS.get()
    return torch.arange(batch) if rows is None else rows.clone()


def track_positions(
    handle: Handle, layers: Iterable[int], receive: Callable[[int, Tensor], None]
) -> None:
    """Call `receive(layer, positions)` before each block of `layers` runs."""
    for layer in sorted(set(layers)):

        def hook(args: tuple[Any, ...], kwargs: dict[str, Any], layer: int = layer) -> None:
            # A block's arguments may still be on the device of the block before it.
            at = token_positions(handle.model, args, kwargs)
            receive(layer, at.to(device_of(handle.model, layer)))

        handle.add_pre_hook(block_of(handle.model, layer), hook)
