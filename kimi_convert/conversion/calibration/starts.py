"""What new mixers start from, by method: the search, and what others do on the same tokens.

Every start is a set of parameters; the output matrix is solved for all of them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from kimi_convert.config.architecture import KdaConfig, ModelConfig
from kimi_convert.config.calibration import InitMethod
from kimi_convert.conversion.calibration import floors, peers
from kimi_convert.conversion.calibration.fixed_start import FixedMethod, LayerGiven
from kimi_convert.conversion.calibration.gate import strongest_directions
from kimi_convert.conversion.calibration.mixer import KdaWeights, to_full_rank, to_parameters
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
        given = LayerGiven(
            layer=layer,
            x=x,
            y=y,
            kda=config.kda,
            rms_norm_eps=config.rms_norm_eps,
            generator=torch.Generator().manual_seed(1_000_003 * seed + layer_idx),
        )
        return StartResult(fixed_parameters(given, _FIXED[method]), {"method": str(method)})

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
    return StartResult(_parameters(found.weights, found.directions, config.kda), record)


def fixed_parameters(given: LayerGiven, method: FixedMethod) -> Mapping[str, torch.Tensor]:
    """Return the parameters of a start that searches nothing."""
    start = method(given)
    directions = strongest_directions(given.layer, num=start.weights.q.shape[1])
    parameters = _parameters(start.weights, directions, given.kda, start.gate_rows)
    if start.gate_rows is not None and not given.kda.full_rank_gates:
        # The directions are uncorrelated and of unit power: these are least squares on x.
        parameters["kda.g_b.weight"] = start.gate_rows @ given.layer.covariance @ directions.T
    return parameters


def _parameters(
    weights: KdaWeights,
    directions: torch.Tensor,
    kda: KdaConfig,
    gate_rows: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    heads, value_dim, width = weights.v.shape
    unsolved = weights.v.new_zeros(heads * value_dim, width)
    made = to_parameters(weights, unsolved, directions)
    if kda.lower_bound is not None:
        made = to_full_rank(made, weights, gate_rows, lower_bound=kda.lower_bound)
    return {name: value for name, value in made.items() if name != "kda.o.weight"}


_FIXED: Mapping[InitMethod, FixedMethod] = {
    InitMethod.ABLATE: floors.ablate,
    InitMethod.MEAN: floors.mean,
    InitMethod.TOKENWISE: floors.tokenwise,
    InitMethod.NAIVE: peers.naive,
    InitMethod.KIL: peers.kil,
    InitMethod.RANDOM: peers.fresh,
    InitMethod.TAYLOR: peers.taylor,
    InitMethod.PRIMING: peers.priming,
}
