"""RoPE, averaged over where a head looks: what a layer that does not rotate can keep of it.

A pair of dims at angle theta per token contributes q' R(theta d) k to the logit at distance d. With
the head's own distribution p(d) of distances, its mean is q' M k, and M moves into the query:

    M = sum_d p(d) R(theta d) = [[c, -s], [s, c]],   c = E cos(theta d),  s = E sin(theta d)

Fast pairs average out (M near 0), slow ones stay. No weights but the query's change.
"""

from __future__ import annotations

import torch

from kimi_convert.config.architecture import MlaConfig
from kimi_convert.conversion.calibration.factors import as_pairs, from_pairs
from kimi_convert.model.rope import rope_frequencies


def mean_rotation(lags: torch.Tensor, sizes: MlaConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return c and s, each [H, r/2], of heads that attend by `lags` [H, T].

    A layer without RoPE gives 1 and 0. YaRN's factor on the rotation is part of both.
    """
    if sizes.rope is None:
        ones = lags.new_ones(len(lags), sizes.qk_rope_head_dim // 2)
        return ones, torch.zeros_like(ones)
    share = lags / lags.sum(-1, keepdim=True).clamp_min(torch.finfo(lags.dtype).tiny)
    frequencies = rope_frequencies(sizes.rope, dim=sizes.qk_rope_head_dim).to(lags.device)
    angles = torch.arange(lags.shape[1], device=lags.device)[:, None] * frequencies
    # The factor is on cos and sin of both sides: q and k are each scaled by it.
    factor = sizes.rope.yarn.rotation_factor**2 if sizes.rope.yarn else 1.0
    return factor * (share @ angles.cos()), factor * (share @ angles.sin())


def rotate_pairs(pairs: torch.Tensor, c: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Apply mean rotations to query rows [H, r/2, 2, D].

    (R(theta t) q) . (R(theta s) k) = (R(theta d) q) . k with d = t - s: the query takes it all.
    """
    first, second = pairs.unbind(2)
    c, s = c.unsqueeze(-1), s.unsqueeze(-1)
    return torch.stack((c * first - s * second, s * first + c * second), 2)


def fold_query(query: torch.Tensor, lags: torch.Tensor, sizes: MlaConfig) -> torch.Tensor:
    """Return q or q_b [H (n + r), in] of a kept layer, for a format that does not rotate.

    The factor that YaRN puts on the softmax scale moves in too; this part is exact.
    """
    scale = sizes.softmax_scale * sizes.qk_head_dim**0.5
    heads = query.float().unflatten(0, (sizes.num_heads, sizes.qk_head_dim)) * scale
    nope, rope = heads.split((sizes.qk_nope_head_dim, sizes.qk_rope_head_dim), 1)
    turned = rotate_pairs(as_pairs(rope, sizes, dim=1), *mean_rotation(lags, sizes))
    return torch.cat((nope, from_pairs(turned, sizes, dim=1)), 1).flatten(0, 1)
