"""What was measured on a text, as sections of the page."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean, median

from kimi_convert.validation.layer_cells import error_cells
from kimi_convert.validation.page.data import ReportData
from kimi_convert.validation.page.table import table_of
from kimi_convert.validation.report import LayerErrors, QualityReport


def quality_sections(data: ReportData) -> Iterable[str]:
    """Yield the scores of the models, each layer beside the teacher's, probes and continuations."""
    if data.quality is None:
        return
    models = {
        "teacher": data.quality.teacher,
        "this checkpoint": data.quality.student,
        "converted mixers off": data.quality.ablated,
    }
    rows = [
        (
            name,
            str(scores.overall.tokens),
            f"{scores.overall.loss:.4f}",
            f"{scores.overall.perplexity:.1f}",
            "-" if scores.overall.kl is None else f"{scores.overall.kl:.4f}",
            "-"
            if scores.overall.top1_agreement is None
            else f"{scores.overall.top1_agreement:.1%}",
        )
        for name, scores in models.items()
        if scores is not None
    ]
    yield "<section><h2>Quality, nats per token</h2>"
    columns = ("model", "tokens", "loss", "perplexity", "KL to teacher", "top-1 agreement")
    yield from table_of(columns, rows)
    yield "</section>"
    yield from _layers(data, data.quality)
    yield from _lookups(data.quality)


def _layers(data: ReportData, quality: QualityReport) -> Iterable[str]:
    if not quality.layers:
        return
    yield "<section><h2>Layers beside the teacher's</h2>"
    yield "<p>Squared errors relative to the teacher's values; KL in nats per token, of the teacher "
    yield "with that layer alone replaced; half-life in tokens, the median over heads.</p>"
    columns = ("layer", "mixer", "basis", "hidden state", "mixer's output",
               "on teacher's input", "cosine", "length", "experts in common", "KL alone",
               "half-life", "write strength", "below norm's eps")  # fmt: skip
    rows = [
        (
            str(layer.layer_idx),
            layer.mixer.upper(),
            row.basis or "-",
            *error_cells(layer),
            *_dynamics(layer),
        )
        for row, layer in zip(data.layers, quality.layers, strict=True)
    ]
    yield from table_of(columns, rows)
    yield "</section>"


def _dynamics(layer: LayerErrors) -> tuple[str, str, str]:
    found = layer.dynamics
    if found is None:
        return "-", "-", "-"
    half_life = median(head[1] for head in found.half_lives)
    return f"{half_life:.3g}", f"{fmean(found.beta):.2f}", f"{fmean(found.eps_share):.1%}"


def _lookups(quality: QualityReport) -> Iterable[str]:
    if not quality.probes and quality.greedy is None:
        return
    yield "<section><h2>Looking up and continuing</h2>"
    if quality.probes:
        yield "<p>Random tokens, of which the context alone tells the answer.</p>"
        rows = [
            (
                f"{probe.name}, {probe.size}",
                str(probe.answers),
                "-" if probe.teacher is None else f"{probe.teacher:.1%}",
                f"{probe.student:.1%}",
            )
            for probe in quality.probes
        ]
        yield from table_of(("probe", "answers", "teacher", "this checkpoint"), rows)
    greedy = quality.greedy
    if greedy is not None:
        parted = greedy.prompts - greedy.whole
        yield f"<p>Greedy, {greedy.prompts} prompts, {greedy.new_tokens} new tokens each: "
        yield f"{greedy.agreed:.1%} are the teacher's up to the first difference; {greedy.whole} "
        yield f"continuations are equal, {parted} part, {greedy.near_ties} at a near tie.</p>"
    yield "</section>"
