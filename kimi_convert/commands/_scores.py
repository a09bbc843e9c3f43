"""How the measurements of a validation read: tables of scores, and what a conversion is worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kimi_convert.commands._report import Sentence, Table

if TYPE_CHECKING:
    from kimi_convert.validation.report import QualityReport, Scores

STUDENT = "this checkpoint"
TEACHER = "its teacher"
ABLATED = "converted mixers switched off"


def scores_table(title: str, rows: Mapping[str, Scores], *, first: str) -> Table:
    """Return one row of scores for each model or kind of text; absent numbers are a dash."""
    return Table(
        title,
        (first, "tokens", "loss", "perplexity", "KL to teacher", "top-1 agreement"),
        tuple((name, *_score_cells(scores)) for name, scores in rows.items()),
        right=("tokens", "loss", "perplexity", "KL to teacher", "top-1 agreement"),
    )


def models_table(quality: QualityReport) -> Table:
    """Return the scores of the checkpoint, its teacher and the ablation, where measured."""
    models = {STUDENT: quality.student, TEACHER: quality.teacher, ABLATED: quality.ablated}
    rows = {name: model.overall for name, model in models.items() if model is not None}
    return scores_table("Quality, nats per token", rows, first="model")


def worth(quality: QualityReport) -> Sentence | None:
    """Say what the converted mixers add over none at all; None if that was not measured."""
    if quality.ablated is None:
        return None
    student, ablated = quality.student.overall, quality.ablated.overall
    measure, mine, without = "loss", student.loss, ablated.loss
    if student.kl is not None and ablated.kl is not None:
        measure, mine, without = "KL to the teacher", student.kl, ablated.kl
    numbers = f"{measure} {mine:.3f} with them, {without:.3f} with them switched off"
    # Written so that NaN counts as worse.
    if mine < without:
        return Sentence(f"The converted mixers help: {numbers}.")
    return Sentence(
        f"The converted mixers do not help yet: {numbers}. As a model this checkpoint is worth "
        "less than one without them; use it as a start for training.",
        warns=True,
    )


def _score_cells(scores: Scores) -> tuple[str, ...]:
    return (
        str(scores.tokens),
        f"{scores.loss:.4f}",
        f"{scores.perplexity:.1f}",
        "-" if scores.kl is None else f"{scores.kl:.4f}",
        "-" if scores.top1_agreement is None else f"{scores.top1_agreement:.1%}",
    )
