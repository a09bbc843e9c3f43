"""One decode step of a whole KDA mixer as `model/kda.py` has it, written over its states."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kimi_convert.kernels.kda.gate import Gate
from kimi_convert.kernels.kda.reference import recurrent_kda_reference
from kimi_convert.kernels.norm import gated_rms_norm, l2_norm
from kimi_convert.kernels.short_conv import short_conv


class MixerStep(NamedTuple):
    """A checked step; see `kda_mixer_step_`."""

    q: Tensor  # [B, H K]
    k: Tensor  # [B, H K]
    v: Tensor  # [B, H V]
    f: Tensor  # [B, H K]
    b: Tensor  # [B, H]
    output_gate: Tensor  # [B, H V]
    conv_weights: tuple[Tensor, Tensor, Tensor]  # [P, 1, W] of q, k and v; P is that of each
    conv_states: tuple[Tensor, Tensor, Tensor]  # [B, P, W - 1], updated in place
    state: Tensor  # [B, H, K, V], updated in place
    gate: Gate
    norm_weight: Tensor  # [V]
    norm_eps: float
    output: Tensor  # [B, H V], written


def kda_mixer_step_reference_(step: MixerStep) -> None:
    """Convolve, normalise, gate, run the recurrence for one token, normalise and gate its output.

    Rounds to the dtype of the activations where the model does: after the convolutions, after the
    recurrence and at the end.

    Source: Kimi Linear report, arXiv 2510.26692, sections 3 and 4.
    """
    _, H, K, _ = step.state.shape
    dtype = step.state.dtype
    convolved: list[Tensor] = []
    for x, weight, past in zip(
        (step.q, step.k, step.v), step.conv_weights, step.conv_states, strict=True
    ):
        y, last = short_conv(x.unsqueeze(1), weight, state=past)  # [B, 1, P]
        past.copy_(last)
        convolved.append(y.unflatten(-1, (H, -1)))  # [B, 1, H, K | V]
    q, k, v = convolved
    mixed, state = recurrent_kda_reference(
        l2_norm(q.to(dtype)),
        l2_norm(k.to(dtype)),
        v.to(dtype),
        step.gate.log_decay(step.f.unsqueeze(1).unflatten(-1, (H, K))).to(dtype),
        step.b.unsqueeze(1).to(dtype).sigmoid(),
        scale=1 / math.sqrt(K),
        state=step.state,
    )
    step.state.copy_(state)
    output_gate = step.output_gate.unsqueeze(1).unflatten(-1, (H, -1))
    normed = gated_rms_norm(mixed.to(v.dtype), output_gate, step.norm_weight, eps=step.norm_eps)
    step.output.copy_(torch.flatten(normed, 1))
