"""What makes features of queries and keys good: `python -m kimi_convert.bench.features`.

    [--teacher DIR] [--text FILE] [--rows N] [--length T]

Each layer's mixer is fitted as the search fits it, with a best write strength and decay per head, and
with one thing changed: the function between the projections and the unit norm, which KDA has as SiLU.
They differ in gain, in sharpness and in whether weights of the values can be negative, apart from each
other. Printed are two-fold errors of the best output matrix for every layer, and how much weights
cancel: |sum of weights| / sum |weights| of a token's past, 1 where none is negative.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F

from kimi_convert.checkpoints.examples import calibration_text, example_checkpoint
from kimi_convert.config.calibration import CalibrationRecipe
from kimi_convert.config.huggingface import read_config
from kimi_convert.conversion.calibration.bases import balanced
from kimi_convert.conversion.calibration.calibration_text import calibration_text as read_text
from kimi_convert.conversion.calibration.mixer import KdaWeights
from kimi_convert.conversion.calibration.moves import MOVES, starting_point, with_basis
from kimi_convert.conversion.calibration.scoring import Scores
from kimi_convert.conversion.calibration.statistics import LayerStatistics, layer_statistics
from kimi_convert.errors import KimiConvertError
from kimi_convert.kernels.kda import chunk_kda
from kimi_convert.kernels.norm import l2_norm
from kimi_convert.kernels.short_conv import short_conv
from kimi_convert.model.loading import open_layers

_CONV_SIZE = 4
_LEAST_GAIN = 3e-4
_MAP_TOKENS = 128  # whose weights are written out
_SINCE = 16  # queries before it have too few values to cancel


@dataclass(frozen=True, slots=True)
class Feature:
    """Maps projections of rms 1, [..., K], to what is brought to unit length; q's and k's."""

    q: Callable[[torch.Tensor], torch.Tensor]
    k: Callable[[torch.Tensor], torch.Tensor]
    mirrored: bool = False  # whether the basis has each direction with both signs
    normed: bool = True  # whether outputs are brought to one length, as KDA does


def _silu(gain: float) -> Feature:
    def apply(x: torch.Tensor) -> torch.Tensor:
        return F.silu(gain * x)

    return Feature(apply, apply)


def _same(apply: Callable[[torch.Tensor], torch.Tensor], *, mirrored: bool = False) -> Feature:
    return Feature(apply, apply, mirrored)


def _signed(x: torch.Tensor) -> torch.Tensor:
    """Return the positive part, every second channel negated."""
    signs = 1 - 2 * (torch.arange(x.shape[-1], device=x.device) % 2)
    return x.relu() * signs


FEATURES: Mapping[str, Feature] = {
    "linear": _same(lambda x: x),
    "SiLU, gain 0.3": _silu(0.3),
    "SiLU, gain 1": _silu(1.0),
    "SiLU, gain 3": _silu(3.0),
    "SiLU, gain 10": _silu(10.0),
    "positive part": _same(torch.relu),
    # The same features, sharpness and magnitudes; the products alone can be negative.
    "positive part, signs of half of q's channels turned": Feature(_signed, torch.relu),
    "positive part, mirrored": _same(torch.relu, mirrored=True),
    "absolute value": _same(torch.abs),
    "x |x|: sharper, signed": _same(lambda x: x * x.abs()),
    "positive part squared: sharper": _same(lambda x: x.relu().square()),
    "x + 3: nearly positive, flat": _same(lambda x: x + 3),
    "exp x": _same(torch.exp),
    "linear, no output norm": Feature(lambda x: x, lambda x: x, normed=False),
    "positive part, no output norm": Feature(torch.relu, torch.relu, normed=False),
}


@dataclass(frozen=True, slots=True)
class Found:
    """One layer with one feature."""

    error: float
    uncancelled: float  # |sum of weights| / sum |weights|


def measure(layer: LayerStatistics, x: torch.Tensor, y: torch.Tensor, feature: Feature) -> Found:
    """Fit a layer with a feature.

    Args:
        layer: the teacher's statistics.
        x: [N, T, D], normalised inputs.
        y: [N, T, D], the teacher's mixer outputs.
        feature: of queries and keys.
    """
    start = starting_point(layer, conv_size=_CONV_SIZE)
    rows = balanced(layer, rope=True, mirrored=feature.mirrored)
    weights = with_basis(layer, start, *rows)
    heads = len(weights.q)
    scores = Scores(_features(x, weights, layer, feature), y, num_heads=heads)
    for move in MOVES:
        if move.name not in ("beta", "decay"):
            continue
        tried = [
            (option, scores.candidate(_features(x, option, layer, feature)))
            for _, option in move.options(layer, weights)
        ]
        for head in range(heads):
            errors = [scores.head_error(candidate, head) for _, candidate in tried]
            option, candidate = tried[min(range(len(tried)), key=errors.__getitem__)]
            if scores.try_head(candidate, head, least_gain=_LEAST_GAIN):
                weights = weights.with_heads(option, [head])
    return Found(scores.error, _uncancelled(x[:1, :_MAP_TOKENS], weights, layer, feature))


def _unit(
    x: torch.Tensor, rows: torch.Tensor, layer: LayerStatistics, apply: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """Return unit features [N, T, H, K] of rows [H, K, D]."""
    scale = layer.power(rows).mean(-1).rsqrt()[:, None, None]
    projected = F.linear(x, (scale * rows).flatten(0, 1)).unflatten(-1, rows.shape[:2])
    return l2_norm(apply(projected))


def _attend(
    x: torch.Tensor, v: torch.Tensor, weights: KdaWeights, layer: LayerStatistics, feature: Feature
) -> torch.Tensor:
    q, k = (
        _unit(x, weights.q, layer, feature.q),
        _unit(x, weights.k, layer, feature.k),
    )
    beta = (x @ weights.beta.T).sigmoid()
    return torch.cat(
        [
            chunk_kda(q[n], k[n], v[n], -weights.rates.expand(*q[n].shape), beta[n])[0]
            for n in (slice(row, row + 4) for row in range(0, len(x), 4))
        ]
    )


def _features(
    x: torch.Tensor, weights: KdaWeights, layer: LayerStatistics, feature: Feature
) -> torch.Tensor:
    """Return z [N, T, H V]."""
    v, _ = short_conv(
        F.linear(x, weights.v.flatten(0, 1)), weights.v_taps.flatten(0, 1).unsqueeze(1)
    )
    o = _attend(x, v.unflatten(-1, weights.v.shape[:2]), weights, layer, feature)
    if feature.normed:
        o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-5)
    return o.flatten(2)


def _uncancelled(
    x: torch.Tensor, weights: KdaWeights, layer: LayerStatistics, feature: Feature
) -> float:
    """Write out each token's weight of each earlier one, by values that are one token each."""
    length, heads = x.shape[1], len(weights.q)
    each = torch.eye(length, device=x.device)[None, :, None].expand(1, length, heads, length)
    w = _attend(x, each, weights, layer, feature)[0, _SINCE:]  # [T, H, T]
    return float((w.sum(-1).abs() / w.abs().sum(-1).clamp_min(1e-12)).mean())


def _layers(
    teacher: Path, text: Path, *, rows: int, length: int
) -> Iterator[tuple[LayerStatistics, torch.Tensor, torch.Tensor]]:
    """Yield every layer's statistics, normalised inputs and outputs on text."""
    recipe = CalibrationRecipe(
        tokens=(rows + 4) * length, sequence_length=length, search_tokens=rows * length,
        validation_tokens=4 * length,
    )  # fmt: skip
    tokens = read_text(text, teacher, read_config(teacher), recipe, seed=0).inputs[:rows]
    with open_layers(teacher) as layers:
        hidden = layers.embedding()(tokens)
        for layer_idx in range(layers.config.num_layers):
            layer = layers.layer(layer_idx)
            assert layer.mla is not None
            x, y = layer.input_norm(hidden), layer.mix(hidden)
            yield layer_statistics(layer.mla, x), x, y
            hidden = layer(hidden)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print a table; exit codes are those of the command line."""
    parser = argparse.ArgumentParser(prog="python -m kimi_convert.bench.features")
    parser.add_argument("--teacher", type=Path, default=example_checkpoint())
    parser.add_argument("--text", type=Path, default=calibration_text())
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    given = parser.parse_args(arguments)
    found: dict[str, list[Found]] = {name: [] for name in FEATURES}
    try:
        for layer, x, y in _layers(
            given.teacher, given.text, rows=given.rows, length=given.length
        ):
            for name, feature in FEATURES.items():
                found[name].append(measure(layer, x, y, feature))
            sys.stderr.write(f"layer {len(found['linear']) - 1} is done\n")
    except KimiConvertError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write("".join(f"{line}\n" for line in _table(found)))
    return 0


def _table(found: Mapping[str, Sequence[Found]]) -> Iterator[str]:
    layers = range(len(next(iter(found.values()))))
    yield f"| feature | mean error | {' | '.join(map(str, layers))} | not cancelled |"
    yield "|" + "---|" * (len(layers) + 3)
    for name, results in found.items():
        errors = " | ".join(f"{one.error:.3f}" for one in results)
        mean, left = fmean(r.error for r in results), fmean(r.uncancelled for r in results)
        yield f"| {name} | {mean:.3f} | {errors} | {left:.2f} |"


if __name__ == "__main__":
    sys.exit(main())
