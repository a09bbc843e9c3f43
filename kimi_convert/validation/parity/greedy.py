"""Greedy continuations: equal, or parted where two tokens were too close to tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from kimi_convert.validation.bounds import tie_margin
from kimi_convert.validation.parity.report import GreedyComparison
from kimi_convert.validation.parity.trace import Greedy


def continue_by(
    step: Callable[[list[int]], torch.Tensor], prompt: Sequence[int], count: int
) -> Greedy:
    """Continue a prompt by the likeliest tokens, without stopping.

    Args:
        step: takes tokens that come after all that it was given before, and returns the logits
            [vocab] after the last, on the CPU.
        prompt: at least one token.
        count: of tokens, at least one.
    """
    pending, rows = list(prompt), list[torch.Tensor]()
    while len(rows) < count:
        rows.append(step(pending))
        pending = [int(rows[-1].argmax())]
    logits = torch.stack(rows)
    return Greedy(logits.argmax(-1), logits)


def compare_greedy(found: Greedy, expected: Greedy, *, bound: float) -> GreedyComparison:
    """Compare two continuations of one prompt.

    After they part they are two texts: only the first difference says something.

    Args:
        found: of the implementation that is judged.
        expected: the reference's.
        bound: on the error of logits, relative to the largest.
    """
    differs = (found.ids != expected.ids).nonzero()
    if not len(differs):
        count = len(expected.ids)
        return GreedyComparison(tokens=count, equal=count, gap=None, margin=None, passed=True)
    at = int(differs[0])
    logits = expected.logits[at].double()
    gap = (logits[expected.ids[at]] - logits[found.ids[at]]).item()
    margin = tie_margin(bound, logits.abs().max().item())
    return GreedyComparison(
        tokens=len(expected.ids), equal=at, gap=gap, margin=margin, passed=gap <= margin
    )
