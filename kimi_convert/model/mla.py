"""Multi-head latent attention: DeepSeek-V2, arXiv 2405.04434, section 2.1.

    c_t   = norm(W_kva x_t)[:R]             the latent, all that is cached of keys and values
    k_r,t = rope((W_kva x_t)[R:])           one rope key for all heads, cached too
    k, v  = W_kvb c_t                       per head: n nope dims of k, then V dims of v
    q_t   = W_q x_t  or  W_qb norm(W_qa x_t);  its last r dims are rotated
    o_t   = sum_s softmax_s(scale q_t . [k_s ; k_r,s]) v_s

With `rope` None (Kimi-Linear, arXiv 2510.26692, section 4: NoPE) nothing rotates and the rope dims
are plain shared dims. Ling-3 multiplies o_t of each head by sigmoid(w_h . x_t). Softmax is fp32. In shapes: H heads, R latent, n nope, r rope, S tokens seen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from kimi_convert.config.architecture import ModelConfig
from kimi_convert.model.cache import MlaCache
from kimi_convert.model.norm import RmsNorm
from kimi_convert.model.numerics import Numerics, wide
from kimi_convert.model.rope import Rotation, rotate, rotation_at

# Queries per step where a mask is needed: bounds the mask at 512 S values instead of T S.
_MASKED_QUERIES = 512


class MultiHeadLatentAttention(nn.Module):
    """The full-attention mixer of all model families."""

    def __init__(self, config: ModelConfig, numerics: Numerics, *, dtype: torch.dtype) -> None:
        """Allocate the weights; their values come from a checkpoint."""
        super().__init__()
        sizes, width = config.mla, config.hidden_size
        eps = numerics.latent_norm_eps
        eps = config.rms_norm_eps if eps is None else eps
        self.sizes = sizes
        q_width = sizes.num_heads * sizes.qk_head_dim
        if sizes.q_lora_rank is None:
            self.q = nn.Linear(width, q_width, bias=False, dtype=dtype)
        else:
            self.q_a = nn.Linear(width, sizes.q_lora_rank, bias=False, dtype=dtype)
            self.q_a_norm = RmsNorm(sizes.q_lora_rank, eps=eps, dtype=dtype)
            self.q_b = nn.Linear(sizes.q_lora_rank, q_width, bias=False, dtype=dtype)
        kv_a_width = sizes.kv_lora_rank + sizes.qk_rope_head_dim
        kv_b_width = sizes.num_heads * (sizes.qk_nope_head_dim + sizes.v_head_dim)
        self.kv_a = nn.Linear(width, kv_a_width, bias=False, dtype=dtype)
        self.kv_a_norm = RmsNorm(sizes.kv_lora_rank, eps=eps, dtype=dtype)
        self.kv_b = nn.Linear(sizes.kv_lora_rank, kv_b_width, bias=False, dtype=dtype)
        if sizes.gated:
            self.gate = nn.Linear(width, sizes.num_heads, bias=False, dtype=dtype)
        self.o = nn.Linear(sizes.num_heads * sizes.v_head_dim, width, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor, cache: MlaCache | None = None) -> torch.Tensor:
        """Mix tokens; with a cache, after those that it has seen.

        Args:
            x: [B, T, D], normalised.
            cache: continued from and updated in place.

        Returns:
            [B, T, D], before the residual addition.
        """
        rotation = self._rotation(x, start=0 if cache is None else cache.length)
        q = self._queries(x, rotation)  # [B, T, H, n + r]
        latents = self._latents(x, rotation)  # [B, T, R + r]
        if cache is not None:
            latents = cache.append(latents)  # [B, S, R + r]
        # A single token meets S latents: expanding all of them to keys and values would cost
        # S R H (n + V), the absorbed form S H (2 R + r).
        if cache is not None and x.shape[1] == 1:
            mixed = self._attend_absorbed(q, latents)
        else:
            mixed = self._attend(q, latents)
        if self.sizes.gated:
            gate = self.gate(x).to(wide(x.dtype)).sigmoid()  # [B, T, H]
            mixed = mixed * gate.to(mixed.dtype).unsqueeze(-1)
        return self.o(mixed.flatten(2))  # [B, T, H, V] -> [B, T, D]

    def expanded(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what attention works on, for those who study it: rotated, every head apart.

        Args:
            x: [B, T, D], normalised; the sequences begin with it.

        Returns:
            q [B, T, H, n + r], k [B, T, H, n + r] and v [B, T, H, V].
        """
        rotation = self._rotation(x, start=0)
        return self._queries(x, rotation), *self._keys_values(self._latents(x, rotation))

    def _rotation(self, x: torch.Tensor, *, start: int) -> Rotation | None:
        if self.sizes.rope is None or self.sizes.qk_rope_head_dim == 0:
            return None
        positions = torch.arange(start, start + x.shape[1], device=x.device)
        return rotation_at(self.sizes.rope, positions, dim=self.sizes.qk_rope_head_dim)

    def _queries(self, x: torch.Tensor, rotation: Rotation | None) -> torch.Tensor:
        low_rank = self.sizes.q_lora_rank is not None
        q = self.q_b(self.q_a_norm(self.q_a(x))) if low_rank else self.q(x)
        q = q.unflatten(-1, (self.sizes.num_heads, self.sizes.qk_head_dim))
        if rotation is None:
            return q
        nope, rope = q.split((self.sizes.qk_nope_head_dim, self.sizes.qk_rope_head_dim), -1)
        return torch.cat((nope, self._rotate(rope, rotation)), -1)

    def _latents(self, x: torch.Tensor, rotation: Rotation | None) -> torch.Tensor:
        latent, rope_key = self._split_latents(self.kv_a(x))
        if rotation is not None:
            rope_key = self._rotate(rope_key.unsqueeze(2), rotation).squeeze(2)
        return torch.cat((self.kv_a_norm(latent), rope_key), -1)

    def _split_latents(self, latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return latents.split((self.sizes.kv_lora_rank, self.sizes.qk_rope_head_dim), -1)

    def _rotate(self, x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        assert self.sizes.rope is not None
        return rotate(x, rotation, interleaved=self.sizes.rope.interleaved)

    def _attend(self, q: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Attend with keys and values expanded from the latents: many tokens at once."""
        k, v = self._keys_values(latents)
        return causal_attention(q, k, v, scale=self.sizes.softmax_scale)

    def _keys_values(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sizes = self.sizes
        latent, rope_key = self._split_latents(latents)  # [B, S, R], [B, S, r]
        widths = (sizes.qk_nope_head_dim, sizes.v_head_dim)
        k_nope, v = self.kv_b(latent).unflatten(-1, (sizes.num_heads, -1)).split(widths, -1)
        shared = rope_key.unsqueeze(2).expand(-1, -1, sizes.num_heads, -1)  # [B, S, H, r]
        return torch.cat((k_nope, shared), -1), v  # [B, S, H, n + r], [B, S, H, V]

    def _attend_absorbed(self, q: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Attend over the latents themselves: W_kvb moves to the query and to the output.

        Exact, since q . (W_k c) = (W_k^T q) . c, and rope dims are rotated before they are cached.
        """
        sizes = self.sizes
        w_kv = self.kv_b.weight.unflatten(0, (sizes.num_heads, -1))  # [H, n + V, R]
        w_k, w_v = w_kv.split((sizes.qk_nope_head_dim, sizes.v_head_dim), 1)
        q_nope, q_rope = q.split((sizes.qk_nope_head_dim, sizes.qk_rope_head_dim), -1)
        q_latent = torch.einsum("bthn,hnr->bthr", q_nope, w_k)
        q = torch.cat((q_latent, q_rope), -1).transpose(1, 2)  # [B, H, 1, R + r]
        shared = latents.unsqueeze(1).expand(-1, sizes.num_heads, -1, -1)  # [B, H, S, R + r]
        mixed = F.scaled_dot_product_attention(q, shared, shared, scale=sizes.softmax_scale)
        return torch.einsum("bhtr,hvr->bthv", mixed[..., : sizes.kv_lora_rank], w_v)


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """Softmax attention of the last T of S tokens, in memory linear in T and in S.

    Args:
        q: [B, T, H, K] of the last T tokens.
        k: [B, S, H, K], S >= T.
        v: [B, S, H, V].
        scale: factor on q . k.

    Returns:
        [B, T, H, V] in the dtype of `q`.
    """
    width = v.shape[-1]
    # torch's memory-linear attention on the CPU asks for values as wide as keys.
    common = max(k.shape[-1], width)
    q, k, v = (_widen(x, common).transpose(1, 2) for x in (q, k, v))  # [B, H, T or S, common]
    if q.shape[2] == k.shape[2]:
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        mixed = _attend_after_past(q, k, v, scale=scale)
    return mixed.transpose(1, 2)[..., :width]


def _widen(x: torch.Tensor, width: int) -> torch.Tensor:
    missing = width - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x


def _attend_after_past(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float
) -> torch.Tensor:
    # `is_causal` aligns the first query with the first key; here the last ones must meet.
    past = k.shape[2] - q.shape[2]
    parts: list[torch.Tensor] = []
    for start in range(0, q.shape[2], _MASKED_QUERIES):
        part = q[:, :, start : start + _MASKED_QUERIES]
        seen = past + start + part.shape[2]
        last = torch.arange(past + start, seen, device=q.device)[:, None]
        mask = torch.arange(seen, device=q.device) <= last  # [queries, seen]
        keys, values = k[:, :, :seen], v[:, :, :seen]
        parts.append(
            F.scaled_dot_product_attention(part, keys, values, attn_mask=mask, scale=scale)
        )
    return torch.cat(parts, 2)
