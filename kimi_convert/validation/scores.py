"""Per-token scores of models on one text, and their means over kinds and positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kimi_convert.config.progress import ProgressCallback, ProgressEvent, ignore_progress
from kimi_convert.model.positions import position_ranges
from kimi_convert.validation.metrics import (
    forward_kl,
    perplexity,
    token_loss,
    token_slices,
    top1_agreement,
)
from kimi_convert.validation.report import ModelScores, PositionScores, Scores

# One matrix of logits; about five of that size exist at a time.
_LOGITS_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class TokenScores:
    """One model, every token: [N, T] each, on the CPU."""

    loss: torch.Tensor  # fp64, nats
    kl: torch.Tensor | None = None  # fp64, nats; None without a teacher
    agrees: torch.Tensor | None = None  # bool


@dataclass(frozen=True, slots=True)
class Stream:
    """A model's last hidden state [N, T, D], and its head: hidden -> logits [..., vocab]."""

    hidden: torch.Tensor
    head: Callable[[torch.Tensor], torch.Tensor]


def score_tokens(
    targets: torch.Tensor,
    *,
    students: Sequence[Stream],
    teacher: Stream | None,
    vocab_size: int,
    on_progress: ProgressCallback = ignore_progress,
) -> tuple[list[TokenScores], TokenScores | None]:
    """Score students and their teacher; logits [run, vocab] of a run of tokens exist at a time.

    Args:
        targets: [N, T] int64, the token that follows each position.
        students: what is compared with the teacher.
        teacher: None to measure losses alone.
        vocab_size: how long a row of logits is.
        on_progress: told of every run of tokens.

    Returns:
        The scores of each student, and the teacher's own.
    """
    shape = targets.shape
    flat = targets.flatten()
    parts: list[list[TokenScores]] = [[] for _ in students]
    teacher_parts: list[TokenScores] = []
    for run in token_slices(len(flat), vocab_size=vocab_size, max_bytes=_LOGITS_BYTES):
        on_progress(ProgressEvent("scoring tokens", run.start, len(flat), "tokens"))
        guide = None if teacher is None else _log_probs(teacher, run)
        if guide is not None:
            teacher_parts.append(_score(guide, flat[run], guide=None))
        for student, scored in zip(students, parts, strict=True):
            scored.append(_score(_log_probs(student, run), flat[run], guide=guide))
    on_progress(ProgressEvent("scoring tokens", len(flat), len(flat), "tokens"))
    joined = [_join(scored, shape) for scored in parts]
    return joined, _join(teacher_parts, shape) if teacher_parts else None


def summarise(scores: TokenScores, kinds: Sequence[str]) -> ModelScores:
    """Average over everything, over the rows of each kind, and over ranges of positions."""
    rows = {kind: [n for n, one in enumerate(kinds) if one == kind] for kind in kinds}
    return ModelScores(
        overall=_mean(scores, slice(None), slice(None)),
        by_kind={kind: _mean(scores, where, slice(None)) for kind, where in rows.items()},
        by_position=tuple(
            PositionScores(start, stop, _mean(scores, slice(None), slice(start, stop)))
            for start, stop in position_ranges(scores.loss.shape[1])
        ),
    )


def _log_probs(stream: Stream, run: slice) -> torch.Tensor:
    return stream.head(stream.hidden.flatten(0, 1)[run]).log_softmax(-1)  # [run, vocab]


def _score(
    log_probs: torch.Tensor, targets: torch.Tensor, *, guide: torch.Tensor | None
) -> TokenScores:
    loss = token_loss(log_probs, targets.to(log_probs.device)).cpu()
    if guide is None:
        return TokenScores(loss)
    return TokenScores(
        loss, forward_kl(guide, log_probs).cpu(), top1_agreement(guide, log_probs).cpu()
    )


def _join(parts: Sequence[TokenScores], shape: torch.Size) -> TokenScores:
    kl = [part.kl for part in parts if part.kl is not None]
    agrees = [part.agrees for part in parts if part.agrees is not None]
    return TokenScores(
        torch.cat([part.loss for part in parts]).reshape(shape),
        torch.cat(kl).reshape(shape) if kl else None,
        torch.cat(agrees).reshape(shape) if agrees else None,
    )


def _mean(scores: TokenScores, rows: slice | list[int], positions: slice) -> Scores:
    loss = scores.loss[rows][:, positions]
    mean_loss = loss.mean().item()
    kl, agrees = scores.kl, scores.agrees
    return Scores(
        tokens=loss.numel(),
        loss=mean_loss,
        perplexity=perplexity(mean_loss),
        kl=None if kl is None else kl[rows][:, positions].mean().item(),
        top1_agreement=None
        if agrees is None
        else agrees[rows][:, positions].double().mean().item(),
    )
