"""Least squares with a penalty, from Gram matrices: y ~ Z W.

    W = (Z'Z + lambda diag(Z'Z))^-1 Z'Y

The penalty is relative to each feature's own power, so it does not depend on scales. All sums are
over rows of tokens and in fp64; only the matrices are kept, so any number of tokens can be added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kimi_convert.errors import CalibrationError

# Of the diagonal. Below the first, features that nearly cancel get huge weights, which rounding to
# bf16 and later training both punish.
PENALTIES = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
_VALIDATION_SHARE = 5  # one row of five chooses the penalty
_JITTER = 1e-9  # of the mean power, for a feature that is always 0


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums over tokens: Z'Z [F, F], Z'Y [F, D] fp64, and the sum of Y squared."""

    gram: torch.Tensor
    cross: torch.Tensor
    power: float

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.gram + other.gram, self.cross + other.cross, self.power + other.power)

    def error(self, solution: torch.Tensor) -> float:
        """Return |Y - Z W|^2 / |Y|^2 of a solution W [F, D] fp64."""
        if self.power == 0:
            return 0.0
        explained = 2 * (solution * self.cross).sum() - (solution * (self.gram @ solution)).sum()
        return 1.0 - float(explained) / self.power

    def nearness(self, solution: torch.Tensor) -> Nearness:
        """Compare Z W with Y over all tokens, for a solution W [F, D] fp64."""
        agreed = float((solution * self.cross).sum())
        given = max(float((solution * (self.gram @ solution)).sum()), 0.0)
        scale = math.sqrt(given * self.power)
        return Nearness(
            error=self.error(solution),
            cosine=agreed / scale if scale else 0.0,
            norm_ratio=math.sqrt(given / self.power) if self.power else 0.0,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Nearness:
    """How near an output Z W is to its target Y."""

    error: float  # |Y - Z W|^2 / |Y|^2
    cosine: float  # of the angle between both, over all tokens at once
    norm_ratio: float  # |Z W| / |Y|


@dataclass(frozen=True, slots=True)
class RidgeFit:
    """A solution and how it did on tokens that did not choose it."""

    solution: torch.Tensor  # [F, D] fp32
    penalty: float
    error: float  # relative squared error on the validation rows, before those were added


def moments(z: torch.Tensor, y: torch.Tensor) -> Moments:
    """Sum up features z [..., F] and targets y [..., D] in fp32 products, fp64 totals."""
    flat_z, flat_y = z.flatten(0, -2), y.flatten(0, -2)
    return Moments(
        gram_of(flat_z, flat_z), gram_of(flat_z, flat_y), float(flat_y.double().square().sum())
    )


def gram_of(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a' b of [n, F] and [n, G], fp64."""
    return (a.T @ b).double()


def solve(sums: Moments, penalty: float) -> torch.Tensor:
    """Return W [F, D] fp64.

    Raises:
        CalibrationError: the sums are not finite.
    """
    diagonal = sums.gram.diagonal()
    ridge = torch.diag(penalty * diagonal + _JITTER * diagonal.mean() + torch.finfo().tiny)
    factor, failed = torch.linalg.cholesky_ex(sums.gram + ridge)
    if int(failed) or not bool(sums.cross.isfinite().all()):
        raise CalibrationError(
            "a least-squares problem has no solution",
            expected="finite features and targets",
            found="NaN, Inf or a matrix that is not positive definite",
            hint="Validate the teacher: its values may be too large for this dtype.",
        )
    return torch.cholesky_solve(sums.cross, factor)


def fit_ridge(parts: Sequence[Moments], *, penalties: Sequence[float] = PENALTIES) -> RidgeFit:
    """Choose the penalty on every fifth part, then solve with all of them.

    Args:
        parts: sums over batches of rows, at least two.
        penalties: what to choose from.
    """
    assert len(parts) >= 2
    held = [part for n, part in enumerate(parts) if n % _VALIDATION_SHARE == _held_out(parts)]
    used = [part for n, part in enumerate(parts) if n % _VALIDATION_SHARE != _held_out(parts)]
    fit, check = _sum(used), _sum(held)
    errors = {penalty: check.error(solve(fit, penalty)) for penalty in penalties}
    best = min(errors, key=lambda penalty: errors[penalty])
    return RidgeFit(solve(fit + check, best).float(), best, errors[best])


def _held_out(parts: Sequence[Moments]) -> int:
    """Return which remainder is held out: the last of a full group, or of what there is."""
    return min(len(parts), _VALIDATION_SHARE) - 1


def _sum(parts: Sequence[Moments]) -> Moments:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
