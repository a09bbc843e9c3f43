"""Where scores by position are split: by how many tokens are before, each range longer than the last."""

from __future__ import annotations

from itertools import pairwise

_EDGES = (64, 256, 1024, 4096)


def position_ranges(length: int) -> list[tuple[int, int]]:
    """Return (start, stop) of the ranges of a sequence of so many tokens."""
    edges = [0, *(edge for edge in _EDGES if edge < length), length]
    return list(pairwise(edges))
