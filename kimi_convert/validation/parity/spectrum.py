"""How long KDA layers remember: half-lives of their key channels on the tokens that were run."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kimi_convert.validation.parity.stages import in_order
from kimi_convert.validation.parity.trace import Trace

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# A channel that forgets nothing in fp32 has no half-life: it is shown as this many tokens.
_FOREVER = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class DecaySpectrum:
    """Quantiles over the channels of a layer, in tokens."""

    layer_idx: int
    quantiles: tuple[float, ...]  # of DecaySpectrum.shares
    shares: tuple[float, ...] = _QUANTILES


def decay_spectra(trace: Trace) -> tuple[DecaySpectrum, ...]:
    """Return a spectrum per KDA layer: ln 2 / mean of -g over tokens, for every head and channel."""
    found: list[DecaySpectrum] = []
    for probe in in_order(trace.values):
        if probe.stage == "kda.decay":
            rate = -trace.values[probe].double().flatten(0, 1).mean(0).flatten()  # [H K]
            half_lives = math.log(2) / rate.clamp(min=math.log(2) / _FOREVER)
            at = torch.tensor(_QUANTILES, dtype=torch.float64)
            values = tuple(half_lives.quantile(at).tolist())
            found.append(DecaySpectrum(layer_idx=probe.layer_idx, quantiles=values))
    return tuple(found)
