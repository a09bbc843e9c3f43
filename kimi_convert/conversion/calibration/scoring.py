"""How well mixers could do with the best output matrix, from Gram matrices alone.

The rows are split in two. The output matrix is solved on one half and judged on the other, both
ways: in-sample errors favour features that vary more than they help, and text has far fewer
independent samples than tokens. Whole mixers are scored exactly; one head's candidates are scored
with the other heads' outputs as they stand, which takes a solve of that head's size alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kimi_convert.conversion.calibration.ridge import Moments, gram_of, solve

_PENALTY = 1e-2
# Directions of the target that are scored; what is left of it counts as never reached.
_MOST_TARGETS = 256
_FOLDS = ((0, 1), (1, 0))  # the half that is solved on, and the one that judges
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class Candidate:
    """A mixer's features and their sums, one entry per half."""

    z: torch.Tensor  # [N, T, H V]
    with_current: tuple[torch.Tensor, ...]  # z' z of the current mixer, [H V, H V]
    with_target: tuple[torch.Tensor, ...]  # z' y, [H V, Y]
    own: tuple[torch.Tensor, ...]  # z_h' z_h, [H, V, V]


class Scores:
    """The current mixer on one layer's target, and what candidates would change."""

    def __init__(self, z: torch.Tensor, y: torch.Tensor, *, num_heads: int) -> None:
        """Score a mixer.

        Args:
            z: [N, T, H V], its features; N at least 2.
            y: [N, T, D], the teacher's outputs.
            num_heads: H.
        """
        rows = len(z)
        self._halves = (slice(0, rows // 2), slice(rows // 2, rows))
        self._heads = num_heads
        self.y = _reduced(y)
        self._power = [float(y[half].double().square().sum()) for half in self._halves]
        self.replace(z)

    def replace(self, z: torch.Tensor) -> None:
        """Make z the current mixer's features."""
        self._set(z, self._moments(z))

    @property
    def solution(self) -> torch.Tensor:
        """The output matrix [H V, Y] of both halves together, fp32."""
        return solve(self._sums[0] + self._sums[1], _PENALTY).float()

    def error_of(self, z: torch.Tensor) -> float:
        """Return the error that a whole mixer's features would give."""
        return self._error(*_solved(self._moments(z)))

    def candidate(self, z: torch.Tensor) -> Candidate:
        """Sum up a candidate once, for all its heads."""
        by_head = z.unflatten(-1, (self._heads, -1))
        return Candidate(
            z=z,
            with_current=tuple(self._gram(z, self.z, half) for half in self._halves),
            with_target=tuple(self._gram(z, self.y, half) for half in self._halves),
            own=tuple(
                torch.einsum("nhv,nhw->hvw", part, part).double()
                for part in (by_head[half].flatten(0, 1) for half in self._halves)
            ),
        )

    def head_error(self, candidate: Candidate, head: int) -> float:
        """Return the error with one head from a candidate, the other heads' outputs fixed."""
        block = self._block(head)
        explained = self._without_head(head)
        for fit, check in _FOLDS:
            others = self._others(fit, block)
            residual = [
                candidate.with_target[half][block] - candidate.with_current[half][block] @ others
                for half in (fit, check)
            ]
            own = solve(Moments(candidate.own[fit][head], residual[0], 1.0), _PENALTY)
            explained += float(2 * (own * residual[1]).sum())
            explained -= float((own * (candidate.own[check][head] @ own)).sum())
        return 1.0 - explained / max(sum(self._power), _TINY)

    def _without_head(self, head: int) -> float:
        """Return what the other heads explain, as they stand."""
        if head not in self._left:
            block = self._block(head)
            self._left[head] = sum(
                self._sums[check].power * (1 - self._sums[check].error(self._others(fit, block)))
                for fit, check in _FOLDS
            )
        return self._left[head]

    def _others(self, fit: int, block: slice) -> torch.Tensor:
        others = self._solutions[fit].clone()
        others[block] = 0
        return others

    def try_head(self, candidate: Candidate, head: int, *, least_gain: float) -> bool:
        """Take one head from a candidate if the whole mixer's error falls by at least so much."""
        block = self._block(head)
        z = self.z.clone()
        z[..., block] = candidate.z[..., block]
        sums = [
            self._with_block(part, block, z, candidate.with_target[n], half)
            for n, (part, half) in enumerate(zip(self._sums, self._halves, strict=True))
        ]
        if self._error(*_solved(sums)) > self.error - least_gain:
            return False
        self._set(z, sums)
        return True

    def _with_block(
        self, sums: Moments, block: slice, z: torch.Tensor, with_target: torch.Tensor, half: slice
    ) -> Moments:
        crossed = self._gram(z[..., block], z, half)
        gram, cross = sums.gram.clone(), sums.cross.clone()
        gram[block], gram[:, block], cross[block] = crossed, crossed.T, with_target[block]
        return Moments(gram, cross, sums.power)

    def _set(self, z: torch.Tensor, sums: list[Moments]) -> None:
        self.z = z
        self._sums, self._solutions = _solved(sums)
        self.error = self._error(self._sums, self._solutions)
        self._left: dict[int, float] = {}

    def _moments(self, z: torch.Tensor) -> list[Moments]:
        return [
            Moments(self._gram(z, z, half), self._gram(z, self.y, half), power)
            for half, power in zip(self._halves, self._power, strict=True)
        ]

    def _block(self, head: int) -> slice:
        width = self.z.shape[-1] // self._heads
        return slice(head * width, (head + 1) * width)

    def _error(self, sums: list[Moments], solutions: list[torch.Tensor]) -> float:
        """Judge each half's solution on the other half."""
        explained = sum(
            part.power * (1 - part.error(other))
            for part, other in zip(sums, reversed(solutions), strict=True)
        )
        return 1.0 - explained / max(sum(self._power), _TINY)

    def _gram(self, a: torch.Tensor, b: torch.Tensor, half: slice) -> torch.Tensor:
        return gram_of(a[half].flatten(0, 1), b[half].flatten(0, 1))


def _solved(sums: list[Moments]) -> tuple[list[Moments], list[torch.Tensor]]:
    return sums, [solve(part, _PENALTY) for part in sums]


def _reduced(y: torch.Tensor) -> torch.Tensor:
    """Turn targets [N, T, D] to their strongest directions, at most so many."""
    if y.shape[-1] <= _MOST_TARGETS:
        return y
    flat = y.flatten(0, 1)
    _, vectors = torch.linalg.eigh(gram_of(flat, flat))
    return y @ vectors[:, -_MOST_TARGETS:].to(y.dtype)
