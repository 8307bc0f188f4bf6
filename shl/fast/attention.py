"""TransformerLens's attention at transformers' speed, every HookPoint included.

Stock TransformerLens caches keys before their rotation and rotates all of them again at every
step, builds mask and rotary table anew in each layer, copies the whole cache to append one token
and repeats the key heads. Here keys are cached rotated, in storage that grows in place; mask and
table are made once per forward; and torch's fused scaled dot product replaces scores and pattern,
except where somebody hooks `hook_attn_scores` or `hook_pattern`: there both are formed as stock
does. With TransformerLens's own cache, or arguments that Gemma-3 and Llama have no use for, the
stock code runs. Under `KeyValues`, `hook_rot_k` sees the new positions only.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformer_lens import HookedTransformer
from transformer_lens.components import GroupedQueryAttention

from shl.fast.fused_lora import Joint, joint_output
from shl.fast.kv_cache import Entry
from shl.fast.linear import linear
from shl.hooks.handle import watched
from shl.utils.errors import require
from shl.utils.shapes import Int


@dataclass
class Shared:
    """What all layers of one forward have in common, remembered for the last forward.

    `at` `[batch, pos]` and `seen` `[batch, key]` are what `placed` says of the forward.
    """

    at: Tensor | None = None
    seen: Tensor | None = None
    key: tuple[Any, ...] = ()
    held: Tensor | None = None
    content: Tensor | None = None
    made: dict[tuple[str, str], Any] = field(default_factory=dict)

    def start(self, attention_mask: Tensor | None, offset: int, new: int, like: Tensor) -> None:
        """Forget everything unless this is the same forward as before, on the same device."""
        mask = attention_mask
        # Of inference tensors torch does not count the edits, so their content is compared.
        content = mask.clone() if mask is not None and mask.is_inference() else None
        version = None if mask is None or content is not None else mask._version
        # Inference tensors cannot be saved for a later backward.
        inference = torch.is_inference_mode_enabled()
        key = (id(mask), version, offset, new, inference, like.device, like.dtype)
        edited = (
            content is not None
            and self.content is not None
            and not torch.equal(content, self.content)
        )
        if key != self.key or edited:
            # Holding the mask keeps its id from being given to another tensor.
            self.key, self.held, self.content, self.made = key, mask, content, {}


@contextmanager
def placed(
    model: HookedTransformer,
    at: Int[Tensor, "batch pos"],
    seen: Int[Tensor, "batch key"] | None = None,
) -> Iterator[None]:
    """Say for one cached forward where its new tokens stand, and which keys may be looked at,
    where that does not follow from the attention mask."""
    first: Any = model.blocks[0].attn
    shared: Shared = first.shared
    shared.at, shared.seen, shared.key = at, seen, ()
    try:
        yield
    finally:
        shared.at, shared.seen, shared.key = None, None, ()
        shared.held, shared.made = None, {}


class FastAttention(GroupedQueryAttention):
    """Grouped-query attention whose scores are only formed where somebody looks at them."""

    shared: Shared
    joint: dict[str, Joint]

    @property
    def asks_joint(self) -> bool:
        """Whether the outputs of q, k, v and o may come from `joint`."""
        cfg = self.cfg
        split = cfg.use_split_qkv_input or cfg.use_attn_in
        return not (split or cfg.ungroup_grouped_query_attention or cfg.use_attn_result)

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
            or watched(self.hook_attn_scores)
            or watched(self.hook_pattern)
        )
        ours = isinstance(entry, Entry) or (entry is None and not explicit)
        if not ours or additive_attention_mask is not None or position_bias is not None:
            require(
                not self.joint,
                "inside `decoding` attention needs a cache of shl.fast.kv_cache, no additive mask "
                f"and no position bias; its cache is a {type(entry).__name__}.",
            )
            return super().forward(
                query_input,
                key_input,
                value_input,
                past_kv_cache_entry=entry,
                additive_attention_mask=additive_attention_mask,
                attention_mask=attention_mask,
                position_bias=position_bias,
            )
        q, k, v = self.calculate_qkv_matrices(query_input, key_input, value_input)
        offset = entry.length if entry is not None else 0
        self.shared.start(attention_mask, offset, q.shape[1], q)
        cos, sin = self._rotary(attention_mask, offset, q.shape[1], q.device)
        q = self.hook_rot_q(_rotated(q, cos, sin)).transpose(1, 2)
        k = self.hook_rot_k(_rotated(k, cos, sin)).transpose(1, 2)
        v = v.transpose(1, 2)
        # torch's fused kernels turn a row of NaN scores into zeros, and so does TransformerLens;
        # 0 times NaN or infinity keeps it visible.
        seen = 0 * (q.detach().sum(dtype=torch.float32) + k.detach().sum(dtype=torch.float32))
        if entry is not None:
            k, v = entry.append(k, v)
        allowed = self._allowed(attention_mask, offset, q.shape[2], q.device)
        if explicit:
            return self._project(self._explicit(q, k, v, allowed) + seen.to(v.dtype))
        return self._project(self.hook_z(self._fused(q, k, v, allowed) + seen.to(v.dtype)))

    def calculate_qkv_matrices(
        self, query_input: Tensor, key_input: Tensor, value_input: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """TransformerLens's, `[batch, pos, head, d_head]` each, with this package's products."""
        if query_input.dim() != 3 or self.cfg.ungroup_grouped_query_attention:
            return super().calculate_qkv_matrices(query_input, key_input, value_input)
        q = self.hook_q(self._by_head("q", query_input, "W_Q", "b_Q"))
        k = self.hook_k(self._by_head("k", key_input, "_W_K", "_b_K"))
        v = self.hook_v(self._by_head("v", value_input, "_W_V", "_b_V"))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self._apply_qk_norm(q, self.q_norm), self._apply_qk_norm(k, self.k_norm)
        return q, k, v

    def _rotary(
        self, attention_mask: Tensor | None, offset: int, new: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """cos and sin of the new positions, `[batch or 1, pos, 1, d_head]`; a row's positions
        count its own unmasked tokens, as TransformerLens does."""
        key = ("rotary", self.attn_type)
        if key not in self.shared.made:
            said = self.shared.at
            end = offset + new if said is None else int(said.max()) + 1
            if end > self.rotary_cos.shape[0]:
                room = max(end, 2 * self.rotary_cos.shape[0])
                self._extend_rotary_embeddings(min(self.cfg.n_ctx, room))
            if said is not None:
                at = said
            elif attention_mask is None:
                at = torch.arange(offset, offset + new, device=device)[None]
            else:
                at = (attention_mask.cumsum(1)[:, offset:] - 1).clamp(min=0)
            self.shared.made[key] = (
                self.rotary_cos[at][:, :, None],
                self.rotary_sin[at][:, :, None],
            )
        return self.shared.made[key]

    def _allowed(
        self, attention_mask: Tensor | None, offset: int, new: int, device: torch.device
    ) -> Tensor | None:
        """Which keys a query sees, `[batch or 1, 1, query, key]`; None: all that came before."""
        key = ("allowed", self.attn_type)
        if key not in self.shared.made:
            total = offset + new
            window = self.cfg.window_size if self.attn_type == "local" else None
            window = total if window is None else window
            cut = total > window
            if self.shared.seen is not None:
                attention_mask = self.shared.seen
            plain = attention_mask is None or bool(attention_mask.all())
            if plain and not cut and (offset == 0 or new == 1):
                self.shared.made[key] = None
            else:
                at = torch.arange(total, device=device)
                past = at[None] <= at[offset:, None]
                if cut:
                    past &= at[None] > at[offset:, None] - window
                allowed = past[None, None]
                if attention_mask is not None:
                    allowed = allowed & attention_mask.bool()[:, None, None]
                self.shared.made[key] = allowed
        return self.shared.made[key]

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
        """z `[batch, pos, head, d_head]`, without scores or pattern."""
        heads, kv_heads, new = q.shape[1], k.shape[1], q.shape[2]
        if new == 1:
            # Heads that share keys become queries of one head: no key is repeated.
            q = q.reshape(len(q), kv_heads, -1, q.shape[-1])  # [batch, kv, group, d_head]
        elif heads != kv_heads:
            k, v = (
                repeat(x, "b kv k d -> b (kv group) k d", group=heads // kv_heads) for x in (k, v)
            )
        z = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=allowed,
            is_causal=allowed is None and new > 1,
            scale=1.0 / self.attn_scale,
        )
        if new == 1:
            return rearrange(z, "b kv group d -> b 1 (kv group) d")
        return z.transpose(1, 2)

    def _explicit(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
        """z with scores and pattern formed and hooked, in TransformerLens's own steps."""
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
        out = joint_output(self, "o", z, rows)
        if out is not None:
            return out
        w = self.W_O.flatten(0, 1).T  # [d_model, (head d_head)], a view as in `_by_head`
        return linear(rows, w, self.b_O)

    def _by_head(self, kind: str, x: Tensor, weight: str, bias: str) -> Tensor:
        """q, k or v `[batch, pos, head, d_head]`, from the parameters of these names."""
        out = joint_output(self, kind, x)
        if out is None:
            w, b = getattr(self, weight), getattr(self, bias)
            # Plain views: einops takes ten times as long, which decoding pays in every layer.
            rows = w.mT.flatten(0, 1)  # [(head d_head), d_model]
            out = linear(x, rows, b.flatten())
        return out.unflatten(-1, (-1, self.cfg.d_head))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin
