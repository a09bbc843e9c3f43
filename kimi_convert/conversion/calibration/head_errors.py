"""How much of each of the teacher's heads can be read from the same head of a student.

What head h of the teacher adds to the stream is y_h = a_h W_h. From the student's features z_h of
that head alone the best linear reading is solved on every second sequence and judged on the others,
and the other way round. The heads of a fitted mixer make up for each other, so the error of the
whole mixer is below what these add up to; they tell which heads are hard.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from kimi_convert.conversion.calibration.ridge import Nearness, moments, solve
from kimi_convert.conversion.calibration.streams import batches
from kimi_convert.model.mla import MultiHeadLatentAttention

_PENALTY = 1e-2
_HALVES = (slice(0, None, 2), slice(1, None, 2))


def head_errors(
    teacher: MultiHeadLatentAttention, x: torch.Tensor, z: torch.Tensor
) -> list[Mapping[str, float]]:
    """Return error, cosine and norm ratio of every head, cross-validated.

    Args:
        teacher: the layer's mixer.
        x: [N, T, D], its normalised inputs; N at least 2.
        z: [N, T, H V], the student's features of the same tokens.
    """
    attended = _attended(teacher, x)
    heads = teacher.sizes.num_heads
    columns = teacher.o.weight.float().unflatten(1, (heads, -1))  # [D, H, V]
    found: list[Mapping[str, float]] = []
    for head in range(heads):
        y = attended.unflatten(-1, (heads, -1))[:, :, head] @ columns[:, head].T
        near = _cross_validated(z.unflatten(-1, (heads, -1))[:, :, head], y)
        found.append({"error": near.error, "cosine": near.cosine, "norm_ratio": near.norm_ratio})
    return found


def _attended(teacher: MultiHeadLatentAttention, x: torch.Tensor) -> torch.Tensor:
    """Return what the teacher's output matrix reads, [N, T, H V]."""
    read: list[torch.Tensor] = []

    def keep(_output: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        read.append(inputs[0].float())

    hook = teacher.o.register_forward_pre_hook(keep)
    try:
        for rows in batches(len(x)):
            teacher(x[rows])
    finally:
        hook.remove()
    return torch.cat(read)


def _cross_validated(z: torch.Tensor, y: torch.Tensor) -> Nearness:
    """Compare readings of y [N, T, D] from z [N, T, V] with it, each on the half it did not see."""
    agreed = given = power = 0.0
    halves = [moments(z[half], y[half]) for half in _HALVES]
    for fit, check in (halves, reversed(halves)):
        solution = solve(fit, _PENALTY)
        agreed += float((solution * check.cross).sum())
        given += float((solution * (check.gram @ solution)).sum())
        power += check.power
    scale = math.sqrt(max(given, 0.0) * power)
    return Nearness(
        error=1.0 - (2 * agreed - given) / power if power else 0.0,
        cosine=agreed / scale if scale else 0.0,
        norm_ratio=math.sqrt(max(given, 0.0) / power) if power else 0.0,
    )
