"""What other converters start from, on the same tokens and in KDA's own format.

They made starts for grouped-query attention; MLA has keys and values of its own for every head, so
projections are copied head by head. Where a method says nothing of a part, a fresh layer's draw is
taken. Output matrices are solved for all of them alike, which most of them did not do.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from kimi_convert.conversion.calibration.fixed_start import (
    FixedStart,
    LayerGiven,
    teachers_projections,
)
from kimi_convert.conversion.calibration.mixer import KdaWeights
from kimi_convert.conversion.calibration.statistics import LayerStatistics

_TAYLOR_RATES = (1e-3, 5.0)
_TAYLOR_LEAST_DISTANCE = 0.5
_TAYLOR_BETAS = (0.3, 0.7)  # of the head that looks most widely, and of the one that looks least
_TAYLOR_GATE = 0.01  # times the value projection


def naive(given: LayerGiven) -> FixedStart:
    """Copy projections, taps of 1; decay and write strength as a fresh KDA layer draws them.

    Source: flash-linear-attention's `KimiDeltaAttention` defaults.
    """
    return FixedStart(weights=_naive(given))


def kil(given: LayerGiven) -> FixedStart:
    """Copy projections, taps of a half, one half-life of 10 tokens, write strength drawn.

    Source: ServiceNow Fast-LLM, `plan_kil_attention_to_kda`.
    """
    copied = _naive(given)
    heads, _, width = copied.q.shape
    bound = 1 / math.sqrt(width)
    drawn = (2 * torch.rand(heads, width, generator=given.generator) - 1) * bound
    weights = replace(
        copied,
        q_taps=copied.q_taps / 2,
        k_taps=copied.k_taps / 2,
        v_taps=copied.v_taps / 2,
        rates=torch.full_like(copied.rates, 0.1 * math.log(2)),
        beta=drawn.to(copied.beta.device),
    )
    return FixedStart(weights=weights)


def fresh(given: LayerGiven) -> FixedStart:
    """Draw everything as a fresh KDA layer does."""
    copied = _naive(given)
    weights = replace(
        copied,
        q=_normal(copied.q, given.generator),
        k=_normal(copied.k, given.generator),
        v=_normal(copied.v, given.generator),
        q_taps=_uniform(copied.q_taps, given.generator),
        k_taps=_uniform(copied.k_taps, given.generator),
        v_taps=_uniform(copied.v_taps, given.generator),
    )
    return FixedStart(weights=weights)


def taylor(given: LayerGiven) -> FixedStart:
    """Copy projections; half-lives from how far a head looks, write strength from how widely.

    A half-life is the head's mean distance. The write strength is 0.7 for the head of the least
    entropy and 0.3 for that of the most; the original scales random rows by its logit, which does
    not set its mean, and the constant row does. The gate is a hundredth of the value projection.
    Its scale per head on values is left out: the output norm takes it away.

    Source: FutureMLS-Lab, Taylor-Calibrate, `init_ckpt_calibrated.py`, without its 300 gradient
    steps per layer: those are `align`.
    """
    layer = given.layer
    rates = math.log(2) / mean_distance(layer).clamp_min(_TAYLOR_LEAST_DISTANCE)
    wide, narrow = _TAYLOR_BETAS
    spread = (layer.entropy.max() - layer.entropy.min()).clamp_min(1e-3)
    beta = narrow - (narrow - wide) * (layer.entropy - layer.entropy.min()) / spread
    copied = _naive(given)
    weights = replace(
        copied,
        rates=rates.clamp(*_TAYLOR_RATES)[:, None].expand_as(copied.rates),
        beta=beta.logit()[:, None] * layer.constant,
    )
    return FixedStart(weights=weights, gate_rows=_TAYLOR_GATE * layer.factors.v.flatten(0, 1))


def priming(given: LayerGiven) -> FixedStart:
    """Copy projections; taps and dynamics drawn; the gate is (W_O' + W_V) / 2.

    The original's gate is a full matrix. KDA's has as many directions as a head has dims: the
    strongest of the input are taken, in which it is the nearest in mean square.

    Source: awslabs, hybrid-model-factory, `hybrid_layer_init.py`.
    """
    copied = _naive(given)
    weights = replace(
        copied,
        q_taps=_uniform(copied.q_taps, given.generator),
        k_taps=_uniform(copied.k_taps, given.generator),
        v_taps=_uniform(copied.v_taps, given.generator),
    )
    factors = given.layer.factors
    return FixedStart(weights=weights, gate_rows=(factors.o.T + factors.v.flatten(0, 1)) / 2)


def mean_distance(layer: LayerStatistics) -> torch.Tensor:
    """Return how many tokens back each head looks on average, [H].

    The first token counts with its mean distance: what it is given is known on average alone.
    """
    length = layer.lags.shape[1]
    lags = torch.arange(length, device=layer.lags.device)
    share = (length - lags) / length  # of the queries that have a token that far back
    return layer.lags @ (lags * share) + layer.sink * (length - 1) / 2


def _naive(given: LayerGiven) -> KdaWeights:
    factors = given.layer.factors
    heads, key_dim, width = factors.q_nope.shape
    rate = torch.rand(heads, 1, generator=given.generator) * 15 + 1
    step = math.log(1e-3) + torch.rand(heads, key_dim, generator=given.generator) * math.log(100)
    beta = 0.02 * torch.randn(heads, width, generator=given.generator)
    return teachers_projections(
        given, rates=(rate * step.exp()).to(factors.v.device), beta=beta.to(factors.v.device)
    )


def _normal(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return (0.02 * torch.randn(like.shape, generator=generator)).to(like.device)


def _uniform(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return (torch.rand(like.shape, generator=generator) - 0.5).to(like.device)
