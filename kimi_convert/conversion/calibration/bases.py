"""Which directions of a head's queries and keys become KDA's: one function for each basis.

A head's logit is a bilinear form q_t . k_s of rows Q and K on x. KDA brings q and k to unit length
and passes them through SiLU, so it matters which of the many factorisations of that form is used.

`balanced` takes the best one of rank K: with C = E[x x^T], A = (Q C Q^T)^1/2, B = (K C K^T)^1/2 and
the singular values A B = U S V^T, the rows

    S^1/2 U^T A^-1 Q   and   S^1/2 V^T B^-1 K

give the bilinear form of rank K that is nearest in mean square, with equal moments on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from kimi_convert.conversion.calibration.fold import mean_rotation, rotate_pairs
from kimi_convert.conversion.calibration.statistics import LayerStatistics

Rows = tuple[torch.Tensor, torch.Tensor]  # q and k, each [H, K, D]

_EIGENVALUE_FLOOR = 1e-7  # of the largest


def copied(layer: LayerStatistics) -> Rows:
    """Take the teacher's dims that do not rotate, as they are."""
    return layer.factors.q_nope, layer.factors.k_nope


def balanced(
    layer: LayerStatistics, *, rope: bool, centred: bool = False, mirrored: bool = False
) -> Rows:
    """Factor each head's bilinear form anew.

    Args:
        layer: the teacher's.
        rope: whether the rotating dims take part, with their rotation averaged over distances.
        centred: whether keys lose their mean, which softmax does not see.
        mirrored: whether half the rank is taken, each direction with both signs. SiLU passes one
            sign only; the pair makes a kernel that grows where signs agree.
    """
    q, k = layer.factors.q_nope, layer.factors.k_nope * layer.latent_scale
    width = q.shape[1]
    if rope and layer.sizes.qk_rope_head_dim:
        turned = rotate_pairs(layer.factors.q_rope, *mean_rotation(layer.lags, layer.sizes))
        shared = layer.factors.k_rope.flatten(0, 1).expand(len(k), -1, -1)
        q, k = torch.cat((q, turned.flatten(1, 2)), 1), torch.cat((k, shared), 1)
    if centred:
        k = k - (k @ layer.mean).unsqueeze(-1) * layer.constant
    rank = width // 2 if mirrored else width
    q, k = _nearest(q, k, layer.covariance, rank=rank)
    if mirrored:
        q, k = torch.cat((q, -q), 1), torch.cat((k, -k), 1)
        odd = width - q.shape[1]  # an odd width has one row without a partner
        q, k = (torch.cat((rows, rows[:, :odd]), 1) for rows in (q, k))
    return q, k


BASES: Mapping[str, Callable[[LayerStatistics], Rows]] = {
    "copied": copied,
    "balanced": lambda layer: balanced(layer, rope=False),
    "balanced, rope": lambda layer: balanced(layer, rope=True),
    "centred": lambda layer: balanced(layer, rope=False, centred=True),
    "mirrored": lambda layer: balanced(layer, rope=False, mirrored=True),
    "centred, mirrored, rope": lambda layer: balanced(
        layer, rope=True, centred=True, mirrored=True
    ),
}


def _nearest(q: torch.Tensor, k: torch.Tensor, covariance: torch.Tensor, *, rank: int) -> Rows:
    """Return balanced rows [H, rank, D] of the nearest form of that rank."""
    q_root, q_inverse = _square_root(q @ covariance @ q.mT)
    k_root, k_inverse = _square_root(k @ covariance @ k.mT)
    left, values, right = torch.linalg.svd(q_root @ k_root)
    root = values[:, :rank].sqrt().unsqueeze(-1)
    q_rows = root * left[:, :, :rank].mT @ q_inverse @ q.double()
    k_rows = root * right[:, :rank] @ k_inverse @ k.double()
    return q_rows.float(), k_rows.float()


def _square_root(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the symmetric root of [H, d, d] and its inverse, fp64."""
    values, vectors = torch.linalg.eigh(moment.double())
    tiny = torch.finfo(torch.float32).tiny
    least = (_EIGENVALUE_FLOOR * values[:, -1:]).clamp_min(tiny)
    root = values.clamp_min(least).sqrt().unsqueeze(1)
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT
