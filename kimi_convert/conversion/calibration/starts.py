"""What new mixers start from, by method: the search, and what others do on the same tokens.

Every start is a set of parameters; the output matrix is solved for all of them alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.calibration import InitMethod
from kimi_convert.conversion.calibration.gate import strongest_directions
from kimi_convert.conversion.calibration.mixer import KdaWeights, to_parameters
from kimi_convert.conversion.calibration.search import search_mixer
from kimi_convert.conversion.calibration.statistics import LayerStatistics


@dataclass(frozen=True, slots=True)
class StartResult:
    """Parameters of one mixer without its output matrix, and what to note about them."""

    parameters: Mapping[str, torch.Tensor]
    record: Mapping[str, object]


Told = Callable[[int, int], None]
# (statistics, x [N, T, D], y [N, T, D], config of the hybrid, layer, progress) -> result
Start = Callable[
    [LayerStatistics, torch.Tensor, torch.Tensor, ModelConfig, int, Told], StartResult
]


def start_of(method: InitMethod, *, seed: int) -> Start:
    """Return the start that a method names."""

    def start(
        layer: LayerStatistics,
        x: torch.Tensor,
        y: torch.Tensor,
        config: ModelConfig,
        layer_idx: int,
        told: Told,
    ) -> StartResult:
        assert config.kda is not None
        if method is InitMethod.SEARCH:
            return _searched(layer, x, y, config, told)
        generator = torch.Generator().manual_seed(1_000_003 * seed + layer_idx)
        weights = _FIXED[method](layer, config.kda.conv_size, generator)
        directions = strongest_directions(layer, num=weights.q.shape[1])
        return StartResult(_parameters(weights, directions), {"method": str(method)})

    return start


def _searched(
    layer: LayerStatistics, x: torch.Tensor, y: torch.Tensor, config: ModelConfig, told: Told
) -> StartResult:
    assert config.kda is not None
    found = search_mixer(
        layer,
        x,
        y,
        conv_size=config.kda.conv_size,
        rms_norm_eps=config.rms_norm_eps,
        on_move=told,
    )
    record = {
        "method": str(InitMethod.SEARCH),
        "search_error": found.error,
        "start_error": found.start_error,
        "passes": found.passes,
        "choices": [dict(choices) for choices in found.choices],
    }
    return StartResult(_parameters(found.weights, found.directions), record)


def _parameters(weights: KdaWeights, directions: torch.Tensor) -> Mapping[str, torch.Tensor]:
    heads, value_dim, width = weights.v.shape
    unsolved = weights.v.new_zeros(heads * value_dim, width)
    made = to_parameters(weights, unsolved, directions)
    return {name: value for name, value in made.items() if name != "kda.o.weight"}


def _naive(layer: LayerStatistics, conv_size: int, generator: torch.Generator) -> KdaWeights:
    """Copy projections, taps of 1; decay and write strength as a fresh KDA layer draws them.

    Source: flash-linear-attention's `KimiDeltaAttention` defaults.
    """
    factors = layer.factors
    heads, key_dim, width = factors.q_nope.shape
    rate = torch.rand(heads, 1, generator=generator) * 15 + 1
    step = math.log(1e-3) + torch.rand(heads, key_dim, generator=generator) * math.log(100)
    return KdaWeights(
        q=factors.q_nope,
        k=factors.k_nope,
        v=factors.v,
        q_taps=_taps(factors.q_nope, conv_size, 1.0),
        k_taps=_taps(factors.k_nope, conv_size, 1.0),
        v_taps=_taps(factors.v, conv_size, 1.0),
        rates=(rate * step.exp()).to(factors.v.device),
        beta=(0.02 * torch.randn(heads, width, generator=generator)).to(factors.v.device),
        gate=factors.v.new_zeros(heads, width),
    )


def _kil(layer: LayerStatistics, conv_size: int, generator: torch.Generator) -> KdaWeights:
    """Copy projections, taps of a half, one half-life of 10 tokens, write strength drawn.

    Source: ServiceNow Fast-LLM, `plan_kil_attention_to_kda`.
    """
    naive = _naive(layer, conv_size, generator)
    heads, _, width = naive.q.shape
    bound = 1 / math.sqrt(width)
    drawn = (2 * torch.rand(heads, width, generator=generator) - 1) * bound
    return KdaWeights(
        q=naive.q,
        k=naive.k,
        v=naive.v,
        q_taps=naive.q_taps / 2,
        k_taps=naive.k_taps / 2,
        v_taps=naive.v_taps / 2,
        rates=torch.full_like(naive.rates, 0.1 * math.log(2)),
        beta=drawn.to(naive.beta.device),
        gate=naive.gate,
    )


def _random(layer: LayerStatistics, conv_size: int, generator: torch.Generator) -> KdaWeights:
    """Draw everything as a fresh KDA layer does."""
    naive = _naive(layer, conv_size, generator)

    def normal(like: torch.Tensor) -> torch.Tensor:
        return (0.02 * torch.randn(like.shape, generator=generator)).to(like.device)

    def uniform(like: torch.Tensor) -> torch.Tensor:
        return (torch.rand(like.shape, generator=generator) - 0.5).to(like.device)

    return KdaWeights(
        q=normal(naive.q),
        k=normal(naive.k),
        v=normal(naive.v),
        q_taps=uniform(naive.q_taps),
        k_taps=uniform(naive.k_taps),
        v_taps=uniform(naive.v_taps),
        rates=naive.rates,
        beta=naive.beta,
        gate=naive.gate,
    )


_FIXED: Mapping[InitMethod, Callable[[LayerStatistics, int, torch.Generator], KdaWeights]] = {
    InitMethod.NAIVE: _naive,
    InitMethod.KIL: _kil,
    InitMethod.RANDOM: _random,
}


def _taps(rows: torch.Tensor, width: int, gain: float) -> torch.Tensor:
    taps = rows.new_zeros(*rows.shape[:2], width)
    taps[..., -1] = gain
    return taps
