"""Choose one layer's mixer, head by head, without gradients.

Heads do not meet before the output matrix. So one pass over the tokens with an option in all heads
gives every head's features for it, and each head is scored apart; of a move's options each head
takes the best, if the whole mixer gains by it. The number of passes does not grow with the heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from kimi_convert.conversion.calibration.gate import solve_gate
from kimi_convert.conversion.calibration.mixer import KdaWeights, MixerRun
from kimi_convert.conversion.calibration.moves import MOVES, Move, starting_point
from kimi_convert.conversion.calibration.scoring import Candidate, Scores
from kimi_convert.conversion.calibration.statistics import LayerStatistics

_LEAST_GAIN = 3e-4  # of the relative error, for a change to be worth it
_TRIES = 2  # options that a head may try in one move
# A head is first scored with the others' outputs as they are, which a joint solve can better by
# about so much of the relative error; what looks worse than that is not worth the solve.
_SLACK = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """The mixer that was found."""

    weights: KdaWeights
    directions: torch.Tensor  # [K, D], see `gate`
    error: float  # relative squared error, cross-validated
    start_error: float
    passes: int
    choices: tuple[dict[str, str], ...] = field(repr=False)  # per head: move -> option


def search_mixer(
    layer: LayerStatistics,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    conv_size: int,
    rms_norm_eps: float,
    moves: tuple[Move, ...] = MOVES,
    on_move: Callable[[int, int], None] = lambda done, total: None,
) -> SearchResult:
    """Search one layer.

    Args:
        layer: the teacher's statistics.
        x: [N, T, D], normalised inputs; N at least 2.
        y: [N, T, D], the teacher's mixer outputs.
        conv_size: W.
        rms_norm_eps: of the output norm.
        moves: what may change, in this order.
        on_move: told how many moves of how many are done.
    """
    search = _Search(layer, x, y, starting_point(layer, conv_size=conv_size), rms_norm_eps)
    start_error = search.scores.error
    for done, move in enumerate(moves):
        on_move(done, len(moves))
        search.make(move)
    gated = solve_gate(layer, search.run, search.weights, search.scores)
    return SearchResult(
        weights=gated.weights,
        directions=gated.directions,
        error=search.scores.error,
        start_error=start_error,
        passes=search.passes,
        choices=tuple(search.choices),
    )


class _Search:
    """The mixer so far."""

    def __init__(
        self,
        layer: LayerStatistics,
        x: torch.Tensor,
        y: torch.Tensor,
        weights: KdaWeights,
        rms_norm_eps: float,
    ) -> None:
        self.layer = layer
        self.weights = weights
        self.run = MixerRun(x, rms_norm_eps=rms_norm_eps)
        self.heads = len(weights.q)
        self.passes = 1
        self.scores = Scores(self.run.features(weights).flatten(2), y, num_heads=self.heads)
        self.choices: list[dict[str, str]] = [{} for _ in range(self.heads)]

    def make(self, move: Move) -> None:
        """Let every head take the best of a move's options."""
        tried: list[tuple[str, KdaWeights, Candidate]] = []
        ranked: list[tuple[float, int, int]] = []
        for label, weights in move.options(self.layer, self.weights):
            self.passes += 1
            candidate = self.scores.candidate(self.run.features(weights).flatten(2))
            ranked += [
                (self.scores.head_error(candidate, head), head, len(tried))
                for head in range(self.heads)
            ]
            tried.append((label, weights, candidate))
        left = dict.fromkeys(range(self.heads), _TRIES)
        weights = self.weights
        worth_trying = self.scores.error + _SLACK
        for error, head, option in sorted(ranked):
            if not left[head] or error > worth_trying:
                continue
            left[head] -= 1
            label, offered, candidate = tried[option]
            if self.scores.try_head(candidate, head, least_gain=_LEAST_GAIN):
                weights = weights.with_heads(offered, [head])
                self.choices[head][move.name] = label
                left[head] = 0
        self.weights = weights
        self.run.keep(weights)
