"""Rotary position embedding of MLA's rope dims, with YaRN as DeepSeek applies it.

RoPE: arXiv 2104.09864; YaRN: arXiv 2309.00071. YaRN's factor on the softmax is not here: it is
part of `MlaConfig.softmax_scale`. Angles are fp32, and so is the rotation, whatever the input is.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch

from kimi_convert.config.architecture import RopeConfig, YarnConfig
from kimi_convert.model.numerics import wide


class Rotation(NamedTuple):
    """Cosine and sine of every position's angles, each [T, r/2] fp32."""

    cos: torch.Tensor
    sin: torch.Tensor


def rotation_at(rope: RopeConfig, positions: torch.Tensor, *, dim: int) -> Rotation:
    """Return the rotation of each position.

    Args:
        rope: base, pairing and YaRN.
        positions: [T] integers, counted from 0.
        dim: how many dims rotate, r.
    """
    frequencies = _frequencies_on(rope, dim, positions.device)
    angles = positions.to(torch.float32)[:, None] * frequencies  # [T, r/2]
    factor = rope.yarn.rotation_factor if rope.yarn else 1.0
    return Rotation(angles.cos() * factor, angles.sin() * factor)


@lru_cache(maxsize=64)
def _frequencies_on(rope: RopeConfig, dim: int, device: torch.device) -> torch.Tensor:
    """Copy the frequencies to a device once: a copy waits, and a CUDA graph cannot hold one."""
    with torch.inference_mode(mode=False):  # else what trains later could not use them
        return rope_frequencies(rope, dim=dim).to(device)


def rotate(x: torch.Tensor, rotation: Rotation, *, interleaved: bool) -> torch.Tensor:
    """Rotate pairs of the last axis; the order of the dims stays.

    Args:
        x: [B, T, H, r] in any floating dtype.
        rotation: of the T positions.
        interleaved: pairs are (2j, 2j+1), as DeepSeek stores them; else (j, j + r/2).

    Returns:
        [B, T, H, r] in the dtype of `x`.
    """
    cos, sin = rotation.cos[:, None], rotation.sin[:, None]  # [T, 1, r/2]
    shape = (-1, 2) if interleaved else (2, -1)
    axis = -1 if interleaved else -2
    first, second = x.to(wide(x.dtype)).unflatten(-1, shape).unbind(axis)  # each [B, T, H, r/2]
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), axis)
    return turned.flatten(-2).to(x.dtype)


def rope_frequencies(rope: RopeConfig, *, dim: int) -> torch.Tensor:
    """Return the angle per position of each pair, [r/2] fp32.

    With YaRN, pairs that turn more than `beta_fast` times within the original context keep their
    frequency, pairs that turn less than `beta_slow` times are slowed by `factor`, and a linear
    ramp joins the two.
    """
    periods = rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if rope.yarn is None:
        return 1.0 / periods
    slowed = _yarn_ramp(rope.yarn, rope.theta, dim=dim)
    return slowed / (rope.yarn.factor * periods) + (1.0 - slowed) / periods


def _yarn_ramp(yarn: YarnConfig, theta: float, *, dim: int) -> torch.Tensor:
    """Return how far each pair is interpolated: 0 for fast pairs, 1 for slow ones, [r/2]."""

    def pair_that_turns(times: float) -> float:
        wavelength = yarn.original_max_positions / times
        return dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), dim - 1)
    width = (high - low) or 1e-3  # a ramp of no width is a step
    return ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
