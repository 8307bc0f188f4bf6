"""Tensor shapes as jaxtyping aliases.

Axis names are TransformerLens's: `batch pos d_model head d_head vocab`. `tok` is a flat list of
completion positions, `rank` the rank of an adapter.
"""

from jaxtyping import Bool as Bool
from jaxtyping import Float as Float
from jaxtyping import Int as Int
from torch import Tensor as Tensor

Resid = Float[Tensor, "batch pos d_model"]
"""Residual stream, one vector per token."""
Tokens = Int[Tensor, "batch pos"]
"""Token ids, padded."""
Mask = Int[Tensor, "batch pos"]
"""1 where a token is real, 0 where it is padding."""
Direction = Float[Tensor, " d_model"]
"""One vector of the residual stream."""
Hidden = Float[Tensor, "tok d_model"]
"""Hidden states after the final norm, at selected positions."""
Unembed = Float[Tensor, "d_model vocab"]
"""TransformerLens's `W_U`."""
PerToken = Float[Tensor, " tok"]
"""One number per completion token (nats)."""
Targets = Int[Tensor, " tok"]
"""The next token at each position."""
Down = Float[Tensor, "rank d_in"]
"""Adapter factor A."""
Up = Float[Tensor, "d_out rank"]
"""Adapter factor B."""
