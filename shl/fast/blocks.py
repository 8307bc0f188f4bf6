"""TransformerLens's blocks, norms, MLPs and unembedding in fewer calls, with all HookPoints."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformer_lens.components import GatedMLP, RMSNorm, TransformerBlock, Unembed

from shl.fast.attention import FastAttention
from shl.fast.hooked import inputs_are_read_only, is_hooked
from shl.fast.kv_cache import PerForward
from shl.fast.linear import linear
from shl.utils.model import Model


class FastBlock(TransformerBlock):
    """A pre-norm block that applies the input norm once; TransformerLens applies it for each of q,
    k and v. With hooks on that norm, or pre-hooks that may change one of the three inputs,
    TransformerLens's own forward runs."""

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
            or any(map(is_hooked, self.ln1.modules()))
            or not inputs_are_read_only(attn)
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
    """`x w / sqrt(mean(x^2) + eps)`, as one operation if its steps have no hooks."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d_model]` to `[..., d_model]`."""
        if (
            not x.dtype == self.w.dtype == torch.float32
            or is_hooked(self.hook_scale)
            or is_hooked(self.hook_normalized)
        ):
            return super().forward(x)
        return rms_norm(x, self.w.shape, self.w, self.eps)


class FastGatedMLP(GatedMLP):
    """`(act(x W_gate) * (x W_in) + b_in) W_out + b_out`, with TransformerLens's HookPoints."""

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, pos, d_model]` to `[batch, pos, d_model]`."""
        if self.cfg.is_layer_norm_activation():
            return super().forward(x)
        gate = self.hook_pre(linear(x, self.W_gate.T))
        up = self.hook_pre_linear(linear(x, self.W_in.T))
        post = self.hook_post(self.act_fn(gate) * up + self.b_in)
        return linear(post, self.W_out.T, self.b_out)


class FastUnembed(Unembed):
    """`x W_U + b_U`, with TransformerLens's HookPoints."""

    fast: ClassVar[bool] = True

    def forward(self, residual: Tensor) -> Tensor:
        """`[batch, pos, d_model]` to `[batch, pos, d_vocab]`."""
        return self.hook_out(linear(self.hook_in(residual), self.W_U.T, self.b_U))


FASTER: dict[type[nn.Module], type[nn.Module]] = {
    TransformerBlock: FastBlock,
    RMSNorm: FastRMSNorm,
    GatedMLP: FastGatedMLP,
    Unembed: FastUnembed,
}


def speed_up(model: Model, inv_freq: Mapping[str, Tensor]) -> None:
    """Change the components of a Gemma-3 or Llama model to the fast classes, in place.

    Args:
        inv_freq: transformers' inverse frequencies of the rotation by attention type ("global",
            "local"), `[d_head / 2]` each.
    """
    per_forward = PerForward()
    for module in list(model.modules()):
        module.__class__ = FASTER.get(type(module), type(module))
    for block in model.blocks:
        attention: Any = block.attn
        attention.__class__ = FastAttention
        attention.per_forward = per_forward
        attention.inv_freq = inv_freq[attention.attn_type]
        attention._extend_rotary_embeddings(attention.rotary_cos.shape[0])
