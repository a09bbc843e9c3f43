"""The weights of one MLA layer, multiplied out per head as KDA needs them: no data, fp32.

KDA gives keys and queries unit length, so the positive factors per token that MLA's latent norms
apply drop out, and the products are exact for them. Values keep theirs, 1 / rms(latent).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kimi_convert.config.architecture import MlaConfig
from kimi_convert.model.mla import MultiHeadLatentAttention


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaFactors:
    """Rows on the layer's normalised input x; logits are scale (q_nope . k_nope + rope part)."""

    q_nope: torch.Tensor  # [H, K, D]
    q_rope: torch.Tensor  # [H, r/2, 2, D], the pairs that rotate
    k_nope: torch.Tensor  # [H, K, D]; without the latent's 1 / rms
    k_rope: torch.Tensor  # [r/2, 2, D], shared by all heads
    v: torch.Tensor  # [H, V, D]; without the latent's 1 / rms
    latent: torch.Tensor  # [R, D]
    o: torch.Tensor  # [D, H V], of the teacher's output projection


def mla_factors(mla: MultiHeadLatentAttention) -> MlaFactors:
    """Multiply out the projections of a layer that has its weights."""
    sizes = mla.sizes
    query = mla.q.weight if sizes.q_lora_rank is None else _low_rank_query(mla)
    q = query.float().unflatten(0, (sizes.num_heads, sizes.qk_head_dim))
    down = mla.kv_a.weight.float()
    latent, k_rope = down.split((sizes.kv_lora_rank, sizes.qk_rope_head_dim))
    up = (mla.kv_b.weight.float() * mla.kv_a_norm.weight.float()) @ latent
    k_nope, v = up.unflatten(0, (sizes.num_heads, -1)).split(
        (sizes.qk_nope_head_dim, sizes.v_head_dim), 1
    )
    q_nope, q_rope = q.split((sizes.qk_nope_head_dim, sizes.qk_rope_head_dim), 1)
    return MlaFactors(
        q_nope=q_nope.contiguous(),
        q_rope=as_pairs(q_rope, sizes, dim=1),
        k_nope=k_nope.contiguous(),
        k_rope=as_pairs(k_rope, sizes, dim=0),
        v=v.contiguous(),
        latent=latent,
        o=mla.o.weight.float(),
    )


def as_pairs(rows: torch.Tensor, sizes: MlaConfig, *, dim: int) -> torch.Tensor:
    """Split an axis of r rotating rows into r/2 pairs: [..., r/2, 2, ...]."""
    interleaved = sizes.rope is None or sizes.rope.interleaved
    if interleaved:
        return rows.unflatten(dim, (-1, 2))
    return rows.unflatten(dim, (2, -1)).transpose(dim, dim + 1)


def from_pairs(pairs: torch.Tensor, sizes: MlaConfig, *, dim: int) -> torch.Tensor:
    """Undo `as_pairs`."""
    interleaved = sizes.rope is None or sizes.rope.interleaved
    rows = pairs if interleaved else pairs.transpose(dim, dim + 1)
    return rows.flatten(dim, dim + 1)


def _low_rank_query(mla: MultiHeadLatentAttention) -> torch.Tensor:
    return (mla.q_b.weight.float() * mla.q_a_norm.weight.float()) @ mla.q_a.weight.float()
