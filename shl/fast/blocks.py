"""TransformerLens's components with this package's products and attention, hooks included."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformer_lens import HookedTransformer
from transformer_lens.components import GatedMLP, RMSNorm, TransformerBlock, Unembed

from shl.fast.attention import FastAttention, Shared
from shl.fast.fused_lora import Joint, joint_output
from shl.fast.linear import linear
from shl.hooks.handle import only_looked_at, watched


class FastBlock(TransformerBlock):
    """A pre-norm block that norms its input once, where TransformerLens does so for q, k and v
    each: their inputs are one tensor unless somebody may tell them apart."""

    def forward(
        self,
        resid_pre: Tensor,
        shortformer_pos_embed: Tensor | None = None,
        past_kv_cache_entry: Any = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """TransformerLens's signature and result, `[batch, pos, d_model]`."""
        attn, cfg = self.attn, self.cfg
        if (
            shortformer_pos_embed is not None
            or cfg.use_attn_in
            or cfg.use_split_qkv_input
            or cfg.use_hook_mlp_in
            or any(map(watched, self.ln1.modules()))
            or not only_looked_at(attn)
        ):
            return super().forward(
                resid_pre, shortformer_pos_embed, past_kv_cache_entry, attention_mask
            )
        resid_pre = self.hook_resid_pre(resid_pre)
        x = self.ln1(resid_pre)
        out = attn(
            query_input=x,
            key_input=x,
            value_input=x,
            past_kv_cache_entry=past_kv_cache_entry,
            attention_mask=attention_mask,
        )
        if cfg.use_normalization_before_and_after:
            out = self.ln1_post(out)
        resid_mid = self.hook_resid_mid(resid_pre + self.hook_attn_out(out))
        return self.hook_resid_post(resid_mid + self.apply_mlp(self.ln2(resid_mid)))


class FastRMSNorm(RMSNorm):
    """`x w / sqrt(mean(x^2) + eps)`, in one call where nobody looks at the steps."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d_model]` to the same."""
        if (
            not x.dtype == self.w.dtype == torch.float32
            or watched(self.hook_scale)
            or watched(self.hook_normalized)
        ):
            return super().forward(x)
        return rms_norm(x, self.w.shape, self.w, self.eps)


class FastGatedMLP(GatedMLP):
    """`(act(x W_gate) * (x W_in) + b_in) W_out + b_out`, with TransformerLens's HookPoints."""

    joint: dict[str, Joint]

    @property
    def asks_joint(self) -> bool:
        """Whether the outputs of gate, up and down may come from `joint`."""
        return not self.cfg.is_layer_norm_activation()

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, pos, d_model]` to the same."""
        if self.cfg.is_layer_norm_activation():
            return super().forward(x)
        gate = joint_output(self, "gate", x)
        gate = self.hook_pre(linear(x, self.W_gate.T) if gate is None else gate)
        up = joint_output(self, "up", x)
        up = self.hook_pre_linear(linear(x, self.W_in.T) if up is None else up)
        post = self.hook_post(self.act_fn(gate) * up + self.b_in)
        out = joint_output(self, "down", post)
        return linear(post, self.W_out.T, self.b_out) if out is None else out


class FastUnembed(Unembed):
    """`x W_U + b_U`, with TransformerLens's HookPoints."""

    def forward(self, residual: Tensor) -> Tensor:
        """`[batch, pos, d_model]` to `[batch, pos, d_vocab]`."""
        return self.hook_out(linear(self.hook_in(residual), self.W_U.T, self.b_U))


FASTER: dict[type[nn.Module], type[nn.Module]] = {
    TransformerBlock: FastBlock,
    RMSNorm: FastRMSNorm,
    GatedMLP: FastGatedMLP,
    Unembed: FastUnembed,
}


def speed_up(model: HookedTransformer) -> None:
    """Give a Gemma-3 or Llama model these components, sharing what blocks can share."""
    shared = Shared()
    for module in list(model.modules()):
        module.__class__ = FASTER.get(type(module), type(module))
    for block in model.blocks:
        attention: Any = block.attn
        attention.__class__ = FastAttention
        attention.shared = shared
        for component in (attention, block.mlp):
            component.joint = {}
