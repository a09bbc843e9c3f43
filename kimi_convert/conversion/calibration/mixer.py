"""The weights of one KDA mixer while they are chosen, head by head, and its outputs.

Shapes: H heads, K key dim, V value dim, D model width, W convolution width, N rows, T tokens. The
output matrix is not part of it: for given features Z it is solved, y ~ Z W.

    z_h = norm(o_h) * 2 sigmoid(gate_h . x),   o_h the KDA head's output

The factor 2 is the output norm's weight, so that a gate without logits is 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F

from kimi_convert.kernels.kda import chunk_kda
from kimi_convert.kernels.norm import l2_norm
from kimi_convert.kernels.short_conv import short_conv

# What keeps both ends of softplus^-1 in fp32's range: a channel that never forgets within 10^6
# tokens, and one that forgets nine tenths of everything with each token.
_LEAST_RATE, _MOST_RATE = 7e-7, 4.5
_MOST_OF_BOUND = 0.9  # of the fastest decay that a bounded law has
OUTPUT_NORM_WEIGHT = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class KdaWeights:
    """One mixer, fp32; the first axis of every tensor is the head."""

    q: torch.Tensor  # [H, K, D]
    k: torch.Tensor  # [H, K, D]
    v: torch.Tensor  # [H, V, D]
    q_taps: torch.Tensor  # [H, K, W]; tap W - 1 is the current token's
    k_taps: torch.Tensor  # [H, K, W]
    v_taps: torch.Tensor  # [H, V, W]
    rates: torch.Tensor  # [H, K], -ln of the decay per token
    beta: torch.Tensor  # [H, D], of the logits of the write strength
    gate: torch.Tensor  # [H, D], of the logits of the output gate; in the span of the directions

    def with_heads(self, other: KdaWeights, heads: list[int]) -> KdaWeights:
        """Return these weights with some heads taken from another mixer."""
        changed: dict[str, torch.Tensor] = {}
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine is not theirs:
                changed[field.name] = mine.clone()
                for head in heads:
                    changed[field.name][head] = theirs[head]
        return replace(self, **changed)

    def to(self, device: torch.device) -> KdaWeights:
        """Return the weights on a device."""
        moved = {field.name: getattr(self, field.name).to(device) for field in fields(self)}
        return replace(self, **moved)


@dataclass(slots=True)
class MixerRun:
    """Computes one mixer after another on the same inputs; keeps what did not change.

    Mixers that share a tensor share what is made from it, so that a change of the decay alone
    costs no projection.
    """

    x: torch.Tensor  # [N, T, D], normalised
    rms_norm_eps: float
    _kept: dict[str, tuple[tuple[torch.Tensor, ...], torch.Tensor]]

    def __init__(self, x: torch.Tensor, *, rms_norm_eps: float) -> None:
        """Start with nothing computed."""
        self.x = x
        self.rms_norm_eps = rms_norm_eps
        self._kept = {}

    def features(self, weights: KdaWeights) -> torch.Tensor:
        """Return z [N, T, H, V] of a mixer."""
        normed = self.normed(weights)
        if not bool(weights.gate.any()):
            return normed
        return normed * (2 * (self.x @ weights.gate.T).sigmoid()).unsqueeze(-1)

    def normed(self, weights: KdaWeights) -> torch.Tensor:
        """Return norm(o) [N, T, H, V], before the gate."""
        return self._normed(weights, dict(self._kept))

    def keep(self, weights: KdaWeights) -> None:
        """Let later mixers share q, k and v with this one."""
        self._unit_qk_and_v(weights, self._kept)

    def _normed(self, w: KdaWeights, kept: _Kept) -> torch.Tensor:
        q, k, v = self._unit_qk_and_v(w, kept)
        beta = (self.x @ w.beta.T).sigmoid()  # [N, T, H]
        g = -w.rates.expand(*q.shape)
        parts = zip(*(a.split(_ROWS) for a in (q, k, v, g, beta)), strict=True)
        o = torch.cat([chunk_kda(*part)[0] for part in parts])
        return o * torch.rsqrt(o.square().mean(-1, keepdim=True) + self.rms_norm_eps)

    def _unit_qk_and_v(
        self, w: KdaWeights, kept: _Kept
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return (
            self._convolved("q", w.q, w.q_taps, kept, unit=True),
            self._convolved("k", w.k, w.k_taps, kept, unit=True),
            self._convolved("v", w.v, w.v_taps, kept, unit=False),
        )

    def _convolved(
        self, name: str, rows: torch.Tensor, taps: torch.Tensor, kept: _Kept, *, unit: bool
    ) -> torch.Tensor:
        found = _lookup(kept, name, (rows, taps))
        if found is not None:
            return found
        projected = _lookup(kept, f"{name} projected", (rows,))
        if projected is None:
            projected = F.linear(self.x, rows.flatten(0, 1))
            kept[f"{name} projected"] = ((rows,), projected)
        convolved, _ = short_conv(projected, taps.flatten(0, 1).unsqueeze(1))
        made = convolved.unflatten(-1, rows.shape[:2])
        made = l2_norm(made) if unit else made
        kept[name] = ((rows, taps), made)
        return made


_Kept = dict[str, tuple[tuple[torch.Tensor, ...], torch.Tensor]]
_ROWS = 16  # sequences in one call: bounds what the kernel holds at once


def _lookup(kept: _Kept, name: str, made_from: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
    sources, result = kept.get(name, ((), None))
    same = len(sources) == len(made_from) and all(
        a is b for a, b in zip(sources, made_from, strict=True)
    )
    return result if same else None


def to_full_rank(
    made: Mapping[str, torch.Tensor],
    weights: KdaWeights,
    gate_rows: torch.Tensor | None,
    *,
    lower_bound: float,
) -> dict[str, torch.Tensor]:
    """Return a mixer's parameters for a bounded decay and gates that are one matrix each.

    Args:
        made: what `to_parameters` gives.
        weights: the mixer.
        gate_rows: [H V, D] of the output gate; None for the weights' own, the same in all of a
            head's values.
        lower_bound: of the log decay: rate = -L sigmoid(exp(A_log) dt_bias), with A_log 0.
    """
    low_rank = {"kda.f_a.weight", "kda.f_b.weight", "kda.g_a.weight", "kda.g_b.weight"}
    heads, value_dim, width = weights.v.shape
    shares = weights.rates.clamp_min(_LEAST_RATE) / -lower_bound
    if gate_rows is None:
        gate_rows = weights.gate.repeat_interleave(value_dim, 0)
    return {
        **{name: value for name, value in made.items() if name not in low_rank},
        "kda.A_log": weights.rates.new_zeros(heads),
        "kda.dt_bias": shares.clamp_max(_MOST_OF_BOUND).logit().flatten(),
        "kda.f.weight": weights.rates.new_zeros(weights.rates.numel(), width),
        "kda.g.weight": gate_rows,
    }


def to_parameters(
    weights: KdaWeights, output: torch.Tensor, directions: torch.Tensor
) -> Mapping[str, torch.Tensor]:
    """Return the mixer under the names and in the shapes of Kimi-Linear, fp32.

    Args:
        weights: the mixer.
        output: [H V, D], the solved output matrix; z @ output is the mixer's output.
        directions: [K, D], orthogonal in the inputs' metric: rows of both down-projections. The
            gate's rows lie in their span.
    """
    heads, key_dim, _ = weights.q.shape
    value_dim = weights.v.shape[1]
    rates = weights.rates.clamp(_LEAST_RATE, _MOST_RATE)
    log_rate = rates.log().mean(-1)  # [H]
    steps = rates / log_rate.exp().unsqueeze(-1)
    # softplus^-1(y) = y + log(1 - exp(-y))
    bias = steps + torch.log(-torch.expm1(-steps))
    coordinates = torch.linalg.lstsq(directions.T.double(), weights.gate.T.double()).solution.T
    coordinates = coordinates.to(weights.gate.dtype) + 0.0  # -0 becomes 0: bytes are compared
    gate_rows = coordinates.repeat_interleave(value_dim, 0)  # [H V, K]
    return {
        "kda.q.weight": weights.q.flatten(0, 1),
        "kda.k.weight": weights.k.flatten(0, 1),
        "kda.v.weight": weights.v.flatten(0, 1),
        "kda.q_conv.weight": weights.q_taps.flatten(0, 1).unsqueeze(1),
        "kda.k_conv.weight": weights.k_taps.flatten(0, 1).unsqueeze(1),
        "kda.v_conv.weight": weights.v_taps.flatten(0, 1).unsqueeze(1),
        "kda.A_log": log_rate.reshape(1, 1, heads, 1),
        "kda.dt_bias": bias.flatten(),
        "kda.f_a.weight": directions,
        "kda.f_b.weight": torch.zeros(heads * key_dim, key_dim, device=directions.device),
        "kda.b.weight": weights.beta,
        "kda.g_a.weight": directions,
        "kda.g_b.weight": gate_rows,
        "kda.o_norm.weight": torch.full(
            (value_dim,), OUTPUT_NORM_WEIGHT, device=directions.device
        ),
        "kda.o.weight": output.T,
    }
