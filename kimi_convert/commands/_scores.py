"""How the measurements of a validation read: tables of scores, and what a conversion is worth."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from kimi_convert.commands._report import Sentence, Table

if TYPE_CHECKING:
    from kimi_convert.validation.report import QualityReport, Scores

_NO_OTHERS: Mapping[str, Scores] = MappingProxyType({})


def scores_table(title: str, rows: Mapping[str, Scores], *, first: str) -> Table:
    """Return one row of scores for each model or kind of text; absent numbers are a dash."""
    return Table(
        title,
        (first, "tokens", "loss", "perplexity", "KL to teacher", "top-1 agreement"),
        tuple((name, *_score_cells(scores)) for name, scores in rows.items()),
        right=("tokens", "loss", "perplexity", "KL to teacher", "top-1 agreement"),
    )


def models_table(quality: QualityReport, others: Mapping[str, Scores] = _NO_OTHERS) -> Table:
    """Return the scores of teacher, checkpoint, others and ablation, where measured."""
    models = {
        "teacher": quality.teacher,
        "this checkpoint": quality.student,
        "converted mixers switched off": quality.ablated,
    }
    rows = {name: model.overall for name, model in models.items() if model is not None}
    last = rows.popitem() if quality.ablated is not None and others else None
    rows |= dict(others)
    if last is not None:
        rows[last[0]] = last[1]
    return scores_table("Quality, nats per token", rows, first="model")


def worth(quality: QualityReport) -> Sentence | None:
    """Say what the converted mixers add over none at all; None if that was not measured."""
    if quality.ablated is None:
        return None
    student, ablated = quality.student.overall, quality.ablated.overall
    measure, mine, without = "loss", student.loss, ablated.loss
    if student.kl is not None and ablated.kl is not None:
        measure, mine, without = "KL to the teacher", student.kl, ablated.kl
    numbers = f"{measure} is {mine:.3f} with them, {without:.3f} with them switched off"
    # Written so that NaN counts as worse.
    if mine < without:
        return Sentence(f"The converted mixers help: {numbers}.{_gap(quality)}")
    return Sentence(
        f"The converted mixers do not help yet: {numbers}. As it is, the checkpoint is worth less "
        f"than one without them.{_gap(quality)}",
        warns=True,
    )


def _gap(quality: QualityReport) -> str:
    if quality.teacher is None:
        return ""
    mine, teachers = quality.student.overall.loss, quality.teacher.overall.loss
    return f" The teacher is {mine - teachers:.3f} nats per token ahead."


def _score_cells(scores: Scores) -> tuple[str, ...]:
    return (
        str(scores.tokens),
        f"{scores.loss:.4f}",
        f"{scores.perplexity:.1f}",
        "-" if scores.kl is None else f"{scores.kl:.4f}",
        "-" if scores.top1_agreement is None else f"{scores.top1_agreement:.1%}",
    )
