"""The choices that a search makes for every head, as a table: what can change, and to what.

A move gives whole mixers, each with one option set in all heads; the search takes a head's part
from whichever option serves it best. Features with large gains before SiLU are nearly positive,
and positive features average where signed ones cancel (docs/calibration.md, Search, has what that is
worth); gains, shifts along the constant row and mirrored bases are ways to have more or less of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from kimi_convert.conversion.calibration.bases import BASES
from kimi_convert.conversion.calibration.mixer import KdaWeights
from kimi_convert.conversion.calibration.statistics import LayerStatistics

Options = Iterator[tuple[str, KdaWeights]]

_QK_RMS = 3.0  # of q and k before SiLU, where a search starts
_V_RMS = 1.0
_BETA = 0.1
_HALF_LIVES = (0.3, 300.0)
_LEAST_LAG_SHARE = 1e-4


@dataclass(frozen=True, slots=True)
class Move:
    """One kind of choice."""

    name: str
    options: Callable[[LayerStatistics, KdaWeights], Options]


def starting_point(layer: LayerStatistics, *, conv_size: int) -> KdaWeights:
    """Return the mixer that a search starts from."""
    factors = layer.factors
    heads, key_dim, width = factors.q_nope.shape
    blank = KdaWeights(
        q=factors.q_nope,
        k=factors.k_nope,
        v=factors.v,
        q_taps=_last_tap(factors.q_nope, conv_size),
        k_taps=_last_tap(factors.k_nope, conv_size),
        v_taps=_last_tap(factors.v, conv_size),
        rates=spread(heads, key_dim, *_HALF_LIVES).to(factors.q_nope.device),
        beta=_logit(_BETA) * layer.constant.expand(heads, -1),
        gate=factors.q_nope.new_zeros(heads, width),
    )
    started = with_basis(layer, blank, factors.q_nope, factors.k_nope)
    v_gain = _V_RMS / layer.power(factors.v).mean(-1).sqrt()
    return replace(started, v_taps=v_gain[:, None, None] * _lag_taps(layer, blank.v_taps))


def with_basis(
    layer: LayerStatistics, weights: KdaWeights, q: torch.Tensor, k: torch.Tensor
) -> KdaWeights:
    """Return the mixer with other rows of q and k, brought to the usual rms before SiLU."""
    gains = [_QK_RMS / layer.power(rows).mean(-1).sqrt() for rows in (q, k)]
    taps = [gain[:, None, None] * _last_tap(q, weights.q_taps.shape[-1]) for gain in gains]
    return replace(weights, q=q, k=k, q_taps=taps[0], k_taps=taps[1])


def spread(heads: int, channels: int, shortest: float, longest: float) -> torch.Tensor:
    """Return rates [H, K] of half-lives in tokens that are evenly spread in log."""
    half_lives = torch.linspace(math.log(shortest), math.log(longest), channels).exp()
    return (math.log(2) / half_lives).expand(heads, -1)


def _basis(layer: LayerStatistics, weights: KdaWeights) -> Options:
    for name, rows in BASES.items():
        yield name, with_basis(layer, weights, *rows(layer))


def _beta(layer: LayerStatistics, weights: KdaWeights) -> Options:
    for beta in (0.02, 0.05, 0.2, 0.4, 0.7, 0.9):
        row = _logit(beta) * layer.constant
        yield f"{beta:g}", replace(weights, beta=row.expand_as(weights.beta))


def _decay(_: LayerStatistics, weights: KdaWeights) -> Options:
    for shortest, longest in ((0.3, 30), (0.3, 3), (3, 1000), (1, 10), (30, 30), (0.2, 1)):
        heads, channels = weights.rates.shape
        rates = spread(heads, channels, shortest, longest).to(weights.rates.device)
        yield f"{shortest:g} to {longest:g}", replace(weights, rates=rates)


def _value_taps(layer: LayerStatistics, weights: KdaWeights) -> Options:
    gain = weights.v_taps.sum(-1, keepdim=True)
    last = _last_tap(weights.v_taps[..., 0], weights.v_taps.shape[-1])
    yield "current", replace(weights, v_taps=gain * last)
    channels = torch.arange(last.shape[1], device=last.device)
    mixed = torch.zeros_like(last)
    mixed[:, channels, last.shape[-1] - 1 - channels % last.shape[-1]] = 1
    yield "each channel its own", replace(weights, v_taps=gain * mixed)
    most = layer.lags[:, : last.shape[-1]].argmax(-1)
    single = torch.zeros_like(last)
    for head, lag in enumerate(most.tolist()):
        single[head, :, last.shape[-1] - 1 - lag] = 1
    yield "most attended", replace(weights, v_taps=gain * single)


def _value_gain(_: LayerStatistics, weights: KdaWeights) -> Options:
    for factor in (0.1, 0.3, 3.0):
        yield f"x {factor:g}", replace(weights, v_taps=factor * weights.v_taps)


def _shift(layer: LayerStatistics, weights: KdaWeights) -> Options:
    for share in (0.5, 1.0, 1.5, -0.5):
        q, k = (
            rows + share * layer.power(rows).mean(-1).sqrt()[:, None, None] * layer.constant
            for rows in (weights.q, weights.k)
        )
        yield f"{share:+g}", with_basis(layer, weights, q, k)


def _gain(_: LayerStatistics, weights: KdaWeights) -> Options:
    for factor in (0.3, 0.5, 2.0, 4.0):
        q_taps, k_taps = factor * weights.q_taps, factor * weights.k_taps
        yield f"x {factor:g}", replace(weights, q_taps=q_taps, k_taps=k_taps)


def _key_taps(_: LayerStatistics, weights: KdaWeights) -> Options:
    moved = torch.zeros_like(weights.k_taps)
    moved[..., :-1] = weights.k_taps[..., 1:]
    yield "previous", replace(weights, k_taps=moved)
    yield "both", replace(weights, k_taps=(moved + weights.k_taps) / 2)


def _beta_factor(layer: LayerStatistics, weights: KdaWeights) -> Options:
    mean = (weights.beta @ layer.mean).sigmoid()  # [H]
    for factor in (0.3, 0.5, 2.0):
        aimed = torch.logit((factor * mean).clamp(1e-4, 0.97))
        change = (aimed - torch.logit(mean, eps=1e-6))[:, None] * layer.constant
        yield f"x {factor:g}", replace(weights, beta=weights.beta + change)


def _decay_factor(_: LayerStatistics, weights: KdaWeights) -> Options:
    for factor in (0.3, 0.6, 1.6, 3.0):
        yield f"x {factor:g}", replace(weights, rates=factor * weights.rates)


def _attended(layer: LayerStatistics, weights: KdaWeights) -> Options:
    for factor in (0.3, 0.6, 1.0):
        yield f"{factor:g}", replace(weights, beta=weights.beta + factor * layer.attended_rows)


# Twice through most of them: what serves best depends on the others.
MOVES = (
    Move("basis", _basis),
    Move("beta", _beta),
    Move("decay", _decay),
    Move("value taps", _value_taps),
    Move("value gain", _value_gain),
    Move("shift", _shift),
    Move("gain", _gain),
    Move("key taps", _key_taps),
    Move("attended", _attended),
    Move("basis", _basis),
    Move("shift", _shift),
    Move("beta factor", _beta_factor),
    Move("decay factor", _decay_factor),
)


def _last_tap(rows: torch.Tensor, width: int) -> torch.Tensor:
    taps = rows.new_zeros(*rows.shape[:2], width)
    taps[..., -1] = 1
    return taps


def _lag_taps(layer: LayerStatistics, like: torch.Tensor) -> torch.Tensor:
    """Return taps [H, V, W] in proportion to the attention at each of the last W tokens."""
    width = like.shape[-1]
    share = layer.lags.new_full((len(like), width), _LEAST_LAG_SHARE)
    known = layer.lags[:, :width].clamp_min(_LEAST_LAG_SHARE)
    share[:, : known.shape[1]] = known
    share = share / share.sum(-1, keepdim=True)
    return share.flip(-1).unsqueeze(1).expand_as(like)


def _logit(p: float) -> float:
    return math.log(p / (1 - p))
