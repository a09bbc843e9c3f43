"""Rows of logits against the reference's: a slice of tokens at a time, so that memory is bounded."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kimi_convert.validation.bounds import tie_margin
from kimi_convert.validation.metrics import token_slices

# Of one slice in fp32; about eight arrays of twice that exist at a time.
_SLICE_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsComparison:
    """Rows of logits against the reference's."""

    relative_error: float  # max |difference| / max |value|
    max_abs_error: float
    one_minus_cosine: float  # of the worst row
    kl: float  # KL(reference || this) of the worst row, nats
    disagreements: int  # rows whose largest logit is another
    near_ties: int  # of these, rows where the two were too close to tell
    tokens: int  # rows compared


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return max |difference| / max |expected|; infinite if anything is not finite."""
    if found.shape != expected.shape:
        return math.inf
    if not expected.numel():
        return 0.0
    found, expected = found.double(), expected.double()
    error, size = (found - expected).abs().max().item(), expected.abs().max().item()
    if not (math.isfinite(error) and math.isfinite(size)):
        return math.inf
    return error / size if size else (0.0 if error == 0 else math.inf)


def compare_logits(
    found: torch.Tensor, expected: torch.Tensor, *, kept: torch.Tensor, bound: float
) -> LogitsComparison:
    """Compare logits [B, T, vocab].

    Args:
        found: of the implementation that is judged.
        expected: of the reference.
        kept: [B, T] bool, which tokens to compare.
        bound: on the relative error; says which disagreements are near ties.
    """
    mine, theirs = found[kept], expected[kept]  # [N, vocab]
    if not len(theirs):
        return LogitsComparison(
            relative_error=0.0,
            max_abs_error=0.0,
            one_minus_cosine=0.0,
            kl=0.0,
            disagreements=0,
            near_ties=0,
            tokens=0,
        )
    runs = token_slices(len(theirs), vocab_size=theirs.shape[-1], max_bytes=_SLICE_BYTES)
    parts = [_rows(mine[run].double(), theirs[run].double()) for run in runs]
    error, size, cosine, kl, gap = (torch.cat(rows) for rows in zip(*parts, strict=True))
    largest, worst = size.max().item(), error.max().item()
    differs = gap >= 0
    finite = math.isfinite(largest) and math.isfinite(worst)
    return LogitsComparison(
        relative_error=worst / largest
        if finite and largest
        else (0.0 if worst == 0 else math.inf),
        max_abs_error=worst,
        one_minus_cosine=(1 - cosine).max().item(),
        kl=kl.max().item(),
        disagreements=int(differs.sum()),
        near_ties=int((differs & (gap <= tie_margin(bound, largest))).sum()),
        tokens=len(theirs),
    )


def _rows(mine: torch.Tensor, theirs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return for each row: error, size, cosine, KL, and the gap to another choice, else below 0."""
    log_mine, log_theirs = mine.log_softmax(-1), theirs.log_softmax(-1)
    first, second = mine.argmax(-1, keepdim=True), theirs.argmax(-1, keepdim=True)
    gap = (theirs.gather(-1, second) - theirs.gather(-1, first))[:, 0]
    return (
        (mine - theirs).abs().amax(-1),
        theirs.abs().amax(-1),
        torch.cosine_similarity(mine, theirs, dim=-1),
        (log_theirs.exp() * (log_theirs - log_mine)).sum(-1),
        torch.where((first != second)[:, 0], gap, -1.0),
    )
