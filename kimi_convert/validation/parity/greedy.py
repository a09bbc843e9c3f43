"""Greedy continuations: equal, or parted where two tokens were too close to tell."""

from __future__ import annotations

from kimi_convert.validation.bounds import tie_margin
from kimi_convert.validation.parity.report import GreedyComparison
from kimi_convert.validation.parity.trace import Greedy


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
