"""Solve the output gate of every head: how much of it each token lets through.

KDA's output norm gives every token's head output the same length; softmax attention does not. The
gate can restore it. Near 0 its logit u . x acts linearly, 2 sigmoid(u . x) ~ 1 + u . x / 2, and
with the output matrix fixed the best u of all heads is one least-squares problem:

    y - sum_h c_h ~ sum_h (a_h . p) c_h,   c_h = z_h W_h,   p = directions x

The directions are the strongest ones of x, scaled to unit power: they become the rows of both
down-projections of the mixer. The gate and the output matrix are solved in turn.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kimi_convert.conversion.calibration.mixer import KdaWeights, MixerRun
from kimi_convert.conversion.calibration.scoring import Scores
from kimi_convert.conversion.calibration.statistics import LayerStatistics

_ROUNDS = 3
_MOST_UNKNOWNS = 1024  # heads x directions
_PENALTIES = (0.03, 0.3)  # of the mean diagonal
_STEPS = (2.0, 4.0)  # 2 is the linear answer; the sigmoid and the penalty both fall short of it
_LEAST_GAIN = 3e-4
_BATCH_TOKENS = 4096
_POWER_FLOOR = 1e-6  # of the strongest direction's
_LEAST_POWER = 1e-12  # where inputs are all 0


@dataclass(frozen=True, slots=True)
class GatedMixer:
    """A mixer with a gate, and the down-projection that its gate is made of."""

    weights: KdaWeights
    directions: torch.Tensor  # [K, D]


def solve_gate(
    layer: LayerStatistics, run: MixerRun, weights: KdaWeights, scores: Scores
) -> GatedMixer:
    """Return the mixer with the gate that lowers its cross-validated error most.

    Args:
        layer: the teacher's statistics.
        run: the inputs.
        weights: a mixer, its gate included.
        scores: of that mixer; not changed.
    """
    directions = strongest_directions(layer, num=weights.q.shape[1])
    rank = max(1, min(len(directions), _MOST_UNKNOWNS // len(weights.q)))
    p = run.x.flatten(0, 1) @ directions[:rank].T
    normed = run.normed(weights).flatten(0, 1)  # [n, H, V]
    best, error = weights, scores.error
    for _ in range(_ROUNDS):
        z = _gated(normed, run.x.flatten(0, 1), best)
        normal, aim = _normal_equations(z, scores, p)
        tried = [
            replace(
                best, gate=best.gate + step * (change.unflatten(0, (-1, rank)) @ directions[:rank])
            )
            for change in (_solve(normal, aim, penalty) for penalty in _PENALTIES)
            for step in _STEPS
        ]
        shape = scores.z.shape
        errors = [
            scores.error_of(_gated(normed, run.x.flatten(0, 1), one).reshape(shape))
            for one in tried
        ]
        least = min(range(len(tried)), key=errors.__getitem__)
        if errors[least] > error - _LEAST_GAIN:
            break
        best, error = tried[least], errors[least]
        scores.replace(_gated(normed, run.x.flatten(0, 1), best).reshape(shape))
    return GatedMixer(best, directions)


def strongest_directions(layer: LayerStatistics, *, num: int) -> torch.Tensor:
    """Return the rows [num, D] of the strongest directions of x, each of unit power on x."""
    values, vectors = torch.linalg.eigh(layer.covariance.double())
    power = values.flip(0).clamp_min(max(_POWER_FLOOR * float(values[-1]), _LEAST_POWER))
    rows = (vectors.flip(1) / power.sqrt()).T[:num].float()
    missing = num - len(rows)  # a model narrower than a head
    return torch.cat((rows, rows.new_zeros(missing, rows.shape[1]))) if missing > 0 else rows


def _gated(normed: torch.Tensor, x: torch.Tensor, weights: KdaWeights) -> torch.Tensor:
    return normed * (2 * (x @ weights.gate.T).sigmoid()).unsqueeze(-1)


def _normal_equations(
    z: torch.Tensor, scores: Scores, p: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum up the problem of a_h: [H r, H r] and [H r], fp64."""
    heads, rank = z.shape[1], p.shape[1]
    by_head = scores.solution.unflatten(0, (heads, -1))  # [H, V, Y]
    y = scores.y.flatten(0, 1)
    normal = torch.zeros(heads, rank, heads, rank, dtype=torch.float64, device=z.device)
    aim = torch.zeros(heads, rank, dtype=torch.float64, device=z.device)
    for start in range(0, len(z), _BATCH_TOKENS):
        part = slice(start, start + _BATCH_TOKENS)
        c = torch.einsum("nhv,hvy->nhy", z[part], by_head)
        residual = y[part] - c.sum(1)
        aim += (torch.einsum("nhy,ny->nh", c, residual).T @ p[part]).double()
        inner = torch.einsum("nhy,ngy->nhg", c, c)
        for head in range(heads):
            weighted = p[part].unsqueeze(1) * inner[:, head].unsqueeze(-1)  # [n, H, r]
            normal[head] += (p[part].T @ weighted.flatten(1)).unflatten(1, (heads, rank)).double()
    return normal.flatten(2).flatten(0, 1), aim.flatten()


def _solve(normal: torch.Tensor, aim: torch.Tensor, penalty: float) -> torch.Tensor:
    eye = torch.eye(len(normal), dtype=normal.dtype, device=normal.device)
    ridge = penalty * normal.diagonal().mean() + torch.finfo(torch.float32).tiny
    solution = torch.linalg.solve(normal + ridge * eye, aim)
    return solution.float()
