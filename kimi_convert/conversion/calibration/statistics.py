"""What one MLA layer of the teacher does on text: moments of its input, and where it looks.

Attention maps exist for one block of queries at a time, whatever the length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kimi_convert.config.architecture import MlaConfig
from kimi_convert.conversion.calibration.factors import MlaFactors, mla_factors
from kimi_convert.errors import CalibrationError
from kimi_convert.model.mla import MultiHeadLatentAttention

_QUERY_BLOCK = 128
_MAP_ROWS = 16  # sequences whose maps are looked at
_SINK_FROM = 16  # queries before it see too few tokens to tell a sink from their past
_CONSTANT_PENALTY = 1e-4
_ROW_PENALTY = 1e-2
_TINY = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStatistics:
    """Moments are over tokens; maps are per head of the teacher."""

    sizes: MlaConfig
    factors: MlaFactors
    mean: torch.Tensor  # [D], of the normalised input x
    covariance: torch.Tensor  # [D, D], E[x x^T]
    constant: torch.Tensor  # [D]: constant . x is as near to 1 as any row can be
    constant_error: float  # E (constant . x - 1)^2
    latent_scale: float  # mean of 1 / rms(latent)
    lags: torch.Tensor  # [H, T], mean attention to the token that many back, token 0 left out
    sink: torch.Tensor  # [H], mean attention to token 0
    entropy: torch.Tensor  # [H], nats
    attended_rows: torch.Tensor  # [H, D]: ln of the attention a token receives, as a row on x

    def power(self, rows: torch.Tensor) -> torch.Tensor:
        """Return E (row . x)^2 of rows [..., D]."""
        return ((rows @ self.covariance) * rows).sum(-1).clamp_min(_TINY)


def layer_statistics(mla: MultiHeadLatentAttention, x: torch.Tensor) -> LayerStatistics:
    """Measure a layer on its normalised input x [N, T, D].

    Raises:
        CalibrationError: x is not finite, which is a fault of the teacher or of its dtype.
    """
    flat = x.flatten(0, 1)
    if not bool(flat.isfinite().all()):
        raise CalibrationError(
            "the teacher's activations are not finite",
            hint="Validate the teacher first; `--dtype float32` rules out an overflow.",
        )
    mean, covariance = flat.mean(0), flat.T @ flat / len(flat)
    penalty = _share_of_power(covariance, _CONSTANT_PENALTY)
    eye = torch.eye(len(mean), device=x.device)
    constant = torch.linalg.solve(covariance + penalty * eye, mean)
    factors = mla_factors(mla)
    latents = flat @ factors.latent.T
    looked_at = x[:_MAP_ROWS]
    lags, sink, entropy, attended = _maps(mla, looked_at)
    return LayerStatistics(
        sizes=mla.sizes,
        factors=factors,
        mean=mean,
        covariance=covariance,
        constant=constant,
        constant_error=float((flat @ constant - 1).square().mean()),
        latent_scale=float(latents.square().mean(-1).clamp_min(_TINY).rsqrt().mean()),
        lags=lags,
        sink=sink,
        entropy=entropy,
        attended_rows=_centred_rows(looked_at, attended),
    )


def _share_of_power(moments: torch.Tensor, share: float) -> torch.Tensor:
    """Return a penalty in proportion to the mean power; above 0 even where inputs are all 0."""
    return (share * moments.diagonal().mean()).clamp_min(_TINY)


def _centred_rows(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return rows [H, D] on x that follow values [N, T, H] about their mean."""
    flat, aim = x.flatten(0, 1), values.flatten(0, 1)
    gram = flat.T @ flat
    eye = torch.eye(len(gram), device=x.device)
    penalty = _share_of_power(gram, _ROW_PENALTY)
    return torch.linalg.solve(gram + penalty * eye, flat.T @ (aim - aim.mean(0))).T


def _maps(mla: MultiHeadLatentAttention, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return lags [H, T], sink [H], entropy [H] and attended [N, T, H]."""
    length, heads = x.shape[1], mla.sizes.num_heads
    lags = torch.zeros(heads, length, device=x.device)
    sink, entropy = (torch.zeros(heads, device=x.device) for _ in range(2))
    attended: list[torch.Tensor] = []
    for row in x.split(1):
        received = torch.zeros(heads, length, device=x.device)
        for start, block in _attention_blocks(mla, row):
            stop = start + block.shape[1]
            positions = torch.arange(start, stop, device=x.device)
            received += (block * (positions + 1.0)[:, None]).sum(1)
            entropy -= torch.xlogy(block, block).sum((1, 2))
            sink += block[:, positions >= _SINK_FROM, 0].sum(1)
            block[:, :, 0] = 0
            back = (positions[:, None] - torch.arange(length, device=x.device)).clamp_min(0)
            lags.index_add_(1, back.flatten(), block.flatten(1))
        queries = torch.arange(length, 0, -1, device=x.device)  # that see each token
        attended.append((received / queries).clamp_min(_TINY).log().T)
    rows = len(x)
    lags = lags / torch.arange(length, 0, -1, device=x.device) / rows
    sink = sink / max(length - _SINK_FROM, 1) / rows
    return lags, sink, entropy / (rows * length), torch.stack(attended)


def _attention_blocks(
    mla: MultiHeadLatentAttention, row: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the first query and the attention [H, block, T] of each block of queries."""
    q, k, _ = (part[0].float() for part in mla.expanded(row))  # [T, H, ...]
    keys = torch.arange(len(k), device=row.device)
    for start in range(0, len(q), _QUERY_BLOCK):
        block = q[start : start + _QUERY_BLOCK]
        logits = torch.einsum("thd,shd->hts", block, k) * mla.sizes.softmax_scale
        queries = torch.arange(start, start + len(block), device=row.device)
        later = keys > queries[:, None]
        yield start, logits.masked_fill(later, -torch.inf).softmax(-1)
