"""Solve a mixer's output matrix, and judge it on tokens that took no part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kimi_convert.conversion.calibration.ridge import Nearness, fit_ridge, moments
from kimi_convert.conversion.calibration.streams import groups

SOLVED = "solved"
_SWITCHED_OFF = "switched off"


@dataclass(frozen=True, slots=True, kw_only=True)
class SolvedOutput:
    """The output matrix that is used."""

    name: str  # "solved" unless that does more harm than no mixer at all
    matrix: torch.Tensor  # [F, D] fp32, rounded as it will be stored
    penalty: float
    nearness: Nearness  # on validation tokens
    target_power: float  # |aim|^2 over validation tokens

    def to_record(self) -> dict[str, object]:
        """Return what a layer's report notes."""
        return {
            "output": self.name,
            "penalty": self.penalty,
            "error": self.nearness.error,
            "cosine": self.nearness.cosine,
            "norm_ratio": self.nearness.norm_ratio,
        }


def solve_output(
    z: torch.Tensor,
    aim: torch.Tensor,
    *,
    validation_rows: int,
    others: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
) -> SolvedOutput:
    """Solve z W ~ aim.

    Args:
        z: [N, T, F], a mixer's features.
        aim: [N, T, D].
        validation_rows: the last rows, which judge.
        others: matrices [F, D] to fall back to, by name, beside none at all.
        dtype: that the matrix will be stored in.

    Raises:
        CalibrationError: z or aim is not finite.
    """
    rows = len(z) - validation_rows
    fitted = fit_ridge([moments(z[part], aim[part]) for part in groups(rows)])
    judged = moments(z[rows:], aim[rows:])
    solution = fitted.solution
    options = {SOLVED: solution, **others, _SWITCHED_OFF: torch.zeros_like(solution)}
    rounded = {name: value.to(dtype).float() for name, value in options.items()}
    near = {name: judged.nearness(value.double()) for name, value in rounded.items()}
    used = SOLVED if near[SOLVED].error < 1 else min(near, key=lambda name: near[name].error)
    return SolvedOutput(
        name=used,
        matrix=rounded[used],
        penalty=fitted.penalty,
        nearness=near[used],
        target_power=judged.power,
    )
