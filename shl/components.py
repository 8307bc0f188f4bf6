"""TransformerLens's components with this package's products and attention, hooks included."""

from typing import Any

from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.components import GatedMLP, Unembed

from shl.attention import FastAttention, Shared
from shl.linear import linear


class FastGatedMLP(GatedMLP):
    """`(act(x W_gate) * (x W_in) + b_in) W_out + b_out`, with TransformerLens's HookPoints."""

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, pos, d_model]` to the same."""
        if self.cfg.is_layer_norm_activation():
            return super().forward(x)
        gate = self.hook_pre(linear(x, self.W_gate.T))
        up = self.hook_pre_linear(linear(x, self.W_in.T))
        post = self.hook_post(self.act_fn(gate) * up + self.b_in)
        return linear(post, self.W_out.T, self.b_out)


class FastUnembed(Unembed):
    """`x W_U + b_U`, with TransformerLens's HookPoints."""

    def forward(self, residual: Tensor) -> Tensor:
        """`[batch, pos, d_model]` to `[batch, pos, d_vocab]`."""
        return self.hook_out(linear(self.hook_in(residual), self.W_U.T, self.b_U))


def speed_up(model: HookedTransformer) -> None:
    """Give a Gemma-3 or Llama model these components, sharing what blocks can share."""
    shared = Shared()
    for block in model.blocks:
        attention: Any = block.attn
        attention.__class__ = FastAttention
        attention.shared = shared
        if type(block.mlp) is GatedMLP:
            block.mlp.__class__ = FastGatedMLP
    model.unembed.__class__ = FastUnembed
