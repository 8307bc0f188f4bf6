"""TransformerLens's attention with fused scores, and every HookPoint.

TransformerLens caches keys before rotation and rotates all of them at every step, builds the mask
and the rotary table again in each layer, copies the whole cache to append one token and repeats the
key heads. Here keys are cached after rotation in storage that grows in place; mask and table are
built once per forward; and torch's fused scaled dot product replaces scores and pattern, unless
`hook_attn_scores` or `hook_pattern` have hooks. With TransformerLens's own cache, or with arguments
that Gemma-3 and Llama do not use, TransformerLens's code runs. With a `KVCache`, `hook_rot_k` gets
the new positions only.
"""

from typing import Any, ClassVar

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformer_lens.components import GroupedQueryAttention

from shl.fast.hooked import is_hooked
from shl.fast.kv_cache import LayerCache, PerForward
from shl.fast.linear import linear


class FastAttention(GroupedQueryAttention):
    """Grouped-query attention that forms scores and pattern only where they have hooks.

    Attributes:
        per_forward: shared by the layers of a model.
        inv_freq: `[d_head / 2]`, transformers' inverse frequencies of the rotation.
    """

    fast: ClassVar[bool] = True
    per_forward: PerForward
    inv_freq: Tensor

    def calculate_sin_cos_rotary(
        self, rotary_dim: int, n_ctx: int, base: float = 10000, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """sin and cos `[n_ctx, d_head]`, computed as in transformers: position times inverse
        frequency in fp32. TransformerLens divides by the frequency, which changes the angle at
        position 700 by 6e-5."""
        inv_freq = self.inv_freq.float()
        angles = torch.arange(n_ctx, device=inv_freq.device).float()[:, None] * inv_freq.repeat(2)
        return angles.sin().to(dtype), angles.cos().to(dtype)

    def forward(
        self,
        query_input: Tensor,
        key_input: Tensor,
        value_input: Tensor,
        past_kv_cache_entry: Any = None,
        additive_attention_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
    ) -> Tensor:
        """TransformerLens's signature and result, `[batch, pos, d_model]`."""
        entry = past_kv_cache_entry
        explicit = (
            self.cfg.attn_scores_soft_cap > 0
            or is_hooked(self.hook_attn_scores)
            or is_hooked(self.hook_pattern)
        )
        supported = isinstance(entry, LayerCache) or (entry is None and not explicit)
        if not supported or additive_attention_mask is not None or position_bias is not None:
            masks = additive_attention_mask, attention_mask, position_bias
            return super().forward(query_input, key_input, value_input, entry, *masks)
        q, k, v = self.calculate_qkv_matrices(query_input, key_input, value_input)
        offset = entry.length if entry is not None else 0
        self.per_forward.start(attention_mask, offset, q.shape[1], q)
        cos, sin = self._rotary(attention_mask, offset, q.shape[1], q.device)
        q = self.hook_rot_q(_rotated(q, cos, sin)).transpose(1, 2)
        k = self.hook_rot_k(_rotated(k, cos, sin))
        # torch's fused kernels turn a row of NaN scores into zeros, and so does TransformerLens.
        # Adding 0 * NaN makes the NaN visible in the output.
        nan = 0 * (q.detach().sum(dtype=torch.float32) + k.detach().sum(dtype=torch.float32))
        if entry is not None:
            k, v = entry.append(k, v)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        allowed = self._allowed(attention_mask, offset, q.shape[2], q.device)
        if explicit:
            return self._project(self._explicit(q, k, v, allowed) + nan.to(v.dtype))
        return self._project(self.hook_z(self._fused(q, k, v, allowed) + nan.to(v.dtype)))

    def calculate_qkv_matrices(
        self, query_input: Tensor, key_input: Tensor, value_input: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """TransformerLens's method: q, k and v, `[batch, pos, head, d_head]` each."""
        if query_input.dim() != 3 or self.cfg.ungroup_grouped_query_attention:
            return super().calculate_qkv_matrices(query_input, key_input, value_input)
        q = self.hook_q(self._by_head(query_input, "W_Q", "b_Q"))
        k = self.hook_k(self._by_head(key_input, "_W_K", "_b_K"))
        v = self.hook_v(self._by_head(value_input, "_W_V", "_b_V"))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self._apply_qk_norm(q, self.q_norm), self._apply_qk_norm(k, self.k_norm)
        return q, k, v

    def _rotary(
        self, attention_mask: Tensor | None, offset: int, new: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """cos and sin of the new positions, `[batch or 1, pos, 1, d_head]`. As in TransformerLens,
        positions count a row's unmasked tokens."""
        made, key = self.per_forward.made, ("rotary", self.attn_type)
        if key not in made:
            at = self.per_forward.at
            end = offset + new if at is None else int(at.max()) + 1
            if end > self.rotary_cos.shape[0]:
                capacity = max(end, 2 * self.rotary_cos.shape[0])
                self._extend_rotary_embeddings(min(self.cfg.n_ctx, capacity))
            if at is None and attention_mask is None:
                at = torch.arange(offset, offset + new, device=device)[None]
            elif at is None:
                assert attention_mask is not None
                at = (attention_mask.cumsum(1)[:, offset:] - 1).clamp(min=0)
            made[key] = self.rotary_cos[at][:, :, None], self.rotary_sin[at][:, :, None]
        return made[key]

    def _allowed(
        self, attention_mask: Tensor | None, offset: int, new: int, device: torch.device
    ) -> Tensor | None:
        """Which keys a query attends to, `[batch or 1, 1, query, key]`; None for plain causal
        attention."""
        made, key = self.per_forward.made, ("allowed", self.attn_type)
        if key not in made:
            total = offset + new
            window = self.cfg.window_size if self.attn_type == "local" else None
            window = total if window is None else window
            cut = total > window
            if self.per_forward.visible is not None:
                attention_mask = self.per_forward.visible
            plain = attention_mask is None or bool(attention_mask.all())
            if plain and not cut and (offset == 0 or new == 1):
                made[key] = None
            else:
                at = torch.arange(total, device=device)
                past = at[None] <= at[offset:, None]
                if cut:
                    past &= at[None] > at[offset:, None] - window
                allowed = past[None, None]
                if attention_mask is not None:
                    allowed = allowed & attention_mask.bool()[:, None, None]
                made[key] = allowed
        return made[key]

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
        """z `[batch, pos, head, d_head]`, without scores or pattern."""
        heads, kv_heads, new = q.shape[1], k.shape[1], q.shape[2]
        if new == 1:
            # Heads that share keys become queries of one head, so no key is repeated.
            q = q.reshape(len(q), kv_heads, -1, q.shape[-1])  # [batch, kv, group, d_head]
        elif heads != kv_heads:
            group = heads // kv_heads
            k, v = (repeat(x, "b kv k d -> b (kv group) k d", group=group) for x in (k, v))
        causal = allowed is None and new > 1
        z = scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, is_causal=causal, scale=1.0 / self.attn_scale
        )
        if new == 1:
            return rearrange(z, "b kv group d -> b 1 (kv group) d")
        return z.transpose(1, 2)

    def _explicit(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
        """z from hooked scores and pattern, in the same steps as TransformerLens."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = self.calculate_attention_scores(q, k)
        if allowed is None:
            ahead = scores.shape[-1] - scores.shape[-2]
            allowed = torch.ones_like(scores, dtype=torch.bool).tril(ahead)
        scores = self.hook_attn_scores(torch.where(allowed, scores, self.IGNORE.to(scores)))
        pattern = self.hook_pattern(scores.softmax(-1).nan_to_num(0.0))
        return self.calculate_z_scores(v, pattern.to(v.dtype))

    def _project(self, z: Tensor) -> Tensor:
        """The output projection, `[batch, pos, d_model]`."""
        if self.cfg.use_attn_result:
            by_head = einsum(z, self.W_O, "b p head d_head, head d_head d -> b p head d")
            return self.hook_result(by_head).sum(-2) + self.b_O
        rows = z.flatten(2)
        w = self.W_O.flatten(0, 1).T  # [d_model, (head d_head)], a view as in `_by_head`
        return linear(rows, w, self.b_O)

    def _by_head(self, x: Tensor, weight: str, bias: str) -> Tensor:
        """q, k or v `[batch, pos, head, d_head]`, from the named parameters."""
        w, b = getattr(self, weight), getattr(self, bias)
        # Plain views: einops takes ten times as long, at every layer and step.
        rows = w.mT.flatten(0, 1)  # [(head d_head), d_model]
        return linear(x, rows, b.flatten()).unflatten(-1, (-1, self.cfg.d_head))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin
