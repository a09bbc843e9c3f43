"""What a fitted mixer does with time: how long its heads remember, and how strongly they write."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from kimi_convert.conversion.calibration.students import Student
from kimi_convert.model.kda import KimiDeltaAttention

_QUANTILES = (0.1, 0.5, 0.9)
_LONGEST = 1e9  # tokens: what never fades


def dynamics_of(student: Student, x: torch.Tensor) -> Mapping[str, object]:
    """Return half-lives and write strengths of every head on inputs, for a layer's report.

    Args:
        student: a mixer; one that is no KDA has nothing of this.
        x: [N, T, D], normalised inputs.

    Returns:
        "half_lives": for every head the 10 %, 50 % and 90 % quantiles over its key channels, in
        tokens, each channel's by its mean log decay; "beta": for every head the mean.
    """
    mixer = student.module
    if not isinstance(mixer, KimiDeltaAttention):
        return {}
    decay = mixer.log_decay(x).mean((0, 1)).double()  # [H, K]
    half_lives = (-math.log(2) / decay.clamp_max(-math.log(2) / _LONGEST)).cpu()
    levels = torch.tensor(_QUANTILES, dtype=half_lives.dtype)
    return {
        "half_lives": half_lives.quantile(levels, dim=1).T.tolist(),
        "beta": mixer.b(x).sigmoid().mean((0, 1)).tolist(),
    }
