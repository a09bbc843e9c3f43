"""What a fitted mixer does with time, for a layer's report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import torch

from kimi_convert.conversion.calibration.students import Student
from kimi_convert.model.dynamics import mixer_dynamics
from kimi_convert.model.kda import KimiDeltaAttention


def dynamics_of(student: Student, x: torch.Tensor) -> Mapping[str, object]:
    """Return the fields of `MixerDynamics`; a mixer that is no KDA has nothing of this.

    Args:
        student: a mixer.
        x: [N, T, D], normalised inputs.
    """
    mixer = student.module
    if not isinstance(mixer, KimiDeltaAttention):
        return {}
    return asdict(mixer_dynamics(mixer, x))
