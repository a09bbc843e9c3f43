"""What a start that searches nothing is made from, and what it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kimi_convert.config.architecture import KdaConfig
from kimi_convert.conversion.calibration.mixer import KdaWeights
from kimi_convert.conversion.calibration.statistics import LayerStatistics


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGiven:
    """One layer of the teacher."""

    layer: LayerStatistics
    x: torch.Tensor  # [N, T, D], normalised inputs
    y: torch.Tensor  # [N, T, D], outputs of the mixer
    kda: KdaConfig  # of the hybrid
    rms_norm_eps: float  # of the new mixer's output norm
    generator: torch.Generator

    @property
    def conv_size(self) -> int:
        """Taps of the short convolutions."""
        return self.kda.conv_size


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedStart:
    """A mixer without its output matrix."""

    weights: KdaWeights
    # [H V, D], the output gate's logits for every value dim; None where the weights' gate is meant
    gate_rows: torch.Tensor | None = None


FixedMethod = Callable[[LayerGiven], FixedStart]


def teachers_projections(
    given: LayerGiven, *, rates: torch.Tensor, beta: torch.Tensor
) -> KdaWeights:
    """Return a mixer of the teacher's projections, of the current token alone, its gate at a half.

    Args:
        given: the teacher's layer.
        rates: [H, K], of decay.
        beta: [H, D], rows of the write strength's logits.
    """
    factors = given.layer.factors
    return KdaWeights(
        q=factors.q_nope,
        k=factors.k_nope,
        v=factors.v,
        q_taps=last_taps(factors.q_nope, given.conv_size),
        k_taps=last_taps(factors.k_nope, given.conv_size),
        v_taps=last_taps(factors.v, given.conv_size),
        rates=rates,
        beta=beta,
        gate=torch.zeros_like(beta),
    )


def last_taps(rows: torch.Tensor, width: int, gain: float = 1.0) -> torch.Tensor:
    """Return taps [H, d, W] of rows [H, d, D] that pass the current token alone."""
    taps = rows.new_zeros(*rows.shape[:2], width)
    taps[..., -1] = gain
    return taps
