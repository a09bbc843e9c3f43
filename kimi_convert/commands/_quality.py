"""How what was measured on a text reads: models, kinds, positions, layers, probes, continuations."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING

from kimi_convert.commands._report import Section, Sentence, Table
from kimi_convert.commands._scores import models_table, scores_table, worth

if TYPE_CHECKING:
    from kimi_convert.model.recall import ProbeResult
    from kimi_convert.validation.report import GreedyAgreement, LayerErrors, QualityReport

_ERROR_COLUMNS = (
    "layer",
    "mixer",
    "converted",
    "hidden state",
    "mixer",
    "mixer on teacher's input",
    "cosine",
    "length",
    "experts in common",
    "KL alone",
)


def quality_report(quality: QualityReport) -> list[Section]:
    """Return every table that there are numbers for."""
    sections: list[Section] = [models_table(quality)]
    if len(quality.student.by_kind) > 1:
        sections.append(scores_table("By kind of text", quality.student.by_kind, first="kind"))
    if len(quality.student.by_position) > 1:
        rows = {f"{p.start} to {p.stop - 1}": p.scores for p in quality.student.by_position}
        sections.append(
            scores_table("By tokens before in the sequence", rows, first="tokens before")
        )
    if quality.layers:
        sections.append(_errors(quality))
    dynamics = [layer for layer in quality.layers if layer.dynamics is not None]
    if dynamics:
        sections.append(_dynamics(dynamics))
    if quality.probes:
        sections.append(probes_table(quality.probes))
    if quality.greedy is not None:
        sections.append(_greedy(quality.greedy))
    sentence = worth(quality)
    return [*sections, sentence] if sentence else sections


def _errors(quality: QualityReport) -> Table:
    from kimi_convert.validation.layer_cells import error_cells

    rows = tuple(
        (
            str(layer.layer_idx),
            layer.mixer.upper(),
            "yes" if layer.converted else "no",
            *error_cells(layer),
        )
        for layer in quality.layers
    )
    return Table(
        "Squared error relative to the teacher's layer, layers counted from 0; KL of the teacher "
        "with that layer alone replaced",
        _ERROR_COLUMNS,
        rows,
        right=("layer", *_ERROR_COLUMNS[3:]),
    )


def _dynamics(layers: list[LayerErrors]) -> Table:
    rows: list[tuple[str, ...]] = []
    for layer in layers:
        assert layer.dynamics is not None
        medians = [head[1] for head in layer.dynamics.half_lives]
        rows.append(
            (
                str(layer.layer_idx),
                f"{min(medians):.3g}",
                f"{median(medians):.3g}",
                f"{max(medians):.3g}",
                f"{fmean(layer.dynamics.beta):.2f}",
                f"{fmean(layer.dynamics.eps_share):.1%}",
            )
        )
    columns = ("layer", "shortest", "median", "longest", "write strength", "below eps")
    return Table(
        "KDA layers: half-lives of heads in tokens, mean write strength, outputs below the eps of "
        "their norm",
        columns,
        tuple(rows),
        right=columns,
    )


def probes_table(probes: Sequence[ProbeResult], of: str = "this checkpoint") -> Table:
    """Return how many answers teacher and student give."""
    said = {
        "copying": "a span of {} tokens, again",
        "induction": "what followed a token, among {}",
        "pairs": "the value of a key, among {}",
    }
    rows = tuple(
        (
            said[probe.name].format(probe.size),
            str(probe.answers),
            "-" if probe.teacher is None else f"{probe.teacher:.1%}",
            f"{probe.student:.1%}",
        )
        for probe in probes
    )
    columns = ("random tokens", "answers", "teacher", of)
    return Table("Looking up in the context", columns, rows, right=columns[1:])


def _greedy(greedy: GreedyAgreement) -> Sentence:
    after = sorted(one.after for one in greedy.partings if one is not None)
    parted = (
        f", {greedy.near_ties} near ties (a gap of at most {greedy.near_tie:.2f} nats); the first "
        f"difference comes after {after[0]} to {after[-1]} tokens"
        if after
        else ""
    )
    return Sentence(
        f"Greedy, {greedy.prompts} prompts of {greedy.prompt_tokens} tokens, {greedy.new_tokens} new "
        f"ones: {greedy.agreed:.1%} are the teacher's up to the first difference; {greedy.whole} "
        f"continuations are equal, {len(after)} part{parted}."
    )
