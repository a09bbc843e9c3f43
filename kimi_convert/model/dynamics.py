"""What a KDA mixer does with time: how long its heads remember, how strongly they write.

And whether the norm of their outputs normalises.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from kimi_convert.model.kda import KimiDeltaAttention

_QUANTILES = (0.1, 0.5, 0.9)
_LONGEST = 1e9  # tokens: what never fades
_ROWS = 8  # sequences in one call


@dataclass(frozen=True, slots=True, kw_only=True)
class MixerDynamics:
    """One entry per head, in the mean over tokens."""

    half_lives: tuple[tuple[float, ...], ...]  # tokens; 10 %, 50 %, 90 % quantiles over channels
    beta: tuple[float, ...]  # write strength
    eps_share: tuple[float, ...]  # of tokens whose output is smaller than the norm's eps


def mixer_dynamics(mixer: KimiDeltaAttention, x: torch.Tensor) -> MixerDynamics:
    """Run a mixer on inputs and look at it.

    The output norm divides by sqrt(mean o^2 + eps). Where mean o^2 is above eps, every token's
    output gets the same length; below, it keeps its own, divided by sqrt(eps).

    Args:
        mixer: its output matrix may be left out.
        x: [N, T, D], normalised inputs.
    """
    decay = mixer.log_decay(x).mean((0, 1)).double()  # [H, K]
    half_lives = (-math.log(2) / decay.clamp_max(-math.log(2) / _LONGEST)).cpu()
    levels = torch.tensor(_QUANTILES, dtype=half_lives.dtype)
    return MixerDynamics(
        half_lives=tuple(map(tuple, half_lives.quantile(levels, dim=1).T.tolist())),
        beta=tuple(mixer.b(x).float().sigmoid().mean((0, 1)).tolist()),
        eps_share=tuple(_eps_share(mixer, x).tolist()),
    )


def _eps_share(mixer: KimiDeltaAttention, x: torch.Tensor) -> torch.Tensor:
    small: list[torch.Tensor] = []
    eps = mixer.o_norm.eps

    def look(_norm: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        power = inputs[0].float().square().mean(-1)  # [B, T, H]
        small.append((power < eps).double().flatten(0, 1))

    hook = mixer.o_norm.register_forward_pre_hook(look)
    try:
        for rows in x.split(_ROWS):
            mixer(rows)
    finally:
        hook.remove()
    return torch.cat(small).mean(0)
