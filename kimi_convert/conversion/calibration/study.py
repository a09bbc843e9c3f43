"""The first pass: every layer of the teacher is measured, and both of its futures tried out.

For each layer the mixer is searched as if it were converted, and folded as if it were kept. Each
of the two then replaces the teacher's mixer alone, and the changed stream runs on through the
teacher: what it costs at the output, in KL, is what the choice of layers goes by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.progress import ProgressCallback, ProgressEvent
from kimi_convert.conversion.calibration.layer_errors import errors_of_layer
from kimi_convert.conversion.calibration.ridge import fit_ridge, moments
from kimi_convert.conversion.calibration.starts import Start
from kimi_convert.conversion.calibration.statistics import LayerStatistics, layer_statistics
from kimi_convert.conversion.calibration.store import CalibrationStore
from kimi_convert.conversion.calibration.streams import (
    batches,
    copy_stream,
    groups,
    make_stream,
)
from kimi_convert.conversion.calibration.students import KdaStudent, MlaStudent, Student
from kimi_convert.model.block import DecoderLayer
from kimi_convert.model.loading import LayerLoader

STAGE = "fitting mixers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """What was learned of every layer, and of the teacher's own predictions."""

    kl_as_kda: Mapping[int, float]  # layer -> nats per token with that layer alone converted
    kl_as_mla: Mapping[int, float]  # layer -> the same with that layer alone folded
    log_probs: torch.Tensor  # [n, T, vocab] of the validation rows, fp16
    tokens: torch.Tensor  # [n, T], their inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyInput:
    """What the first pass looks at."""

    config: ModelConfig  # of the hybrid, whichever layers it keeps
    search_tokens: torch.Tensor  # [N, T]
    validation_tokens: torch.Tensor  # [n, T]
    fold: bool  # or drop


def study_layers(
    teacher: LayerLoader,
    given: StudyInput,
    start: Start,
    store: CalibrationStore,
    on_progress: ProgressCallback,
) -> Study:
    """Go through the teacher once. Layers that the store has are not searched again."""
    embed = teacher.embedding()
    search = make_stream(given.search_tokens, embed, spill=store.folder)
    check = make_stream(given.validation_tokens, embed, spill=store.folder)
    variants: dict[tuple[str, int], torch.Tensor] = {}
    num_layers = teacher.config.num_layers
    for layer_idx in range(num_layers):
        layer = teacher.layer(layer_idx)
        told = _told(on_progress, layer_idx, num_layers)
        told(0, 1)
        inputs, outputs = _mixer_io(layer, search)
        if not store.has(part_name(layer_idx)):
            with errors_of_layer(layer_idx):
                _fit_layer(layer, layer_idx, inputs, outputs, given, start, store, told)
        for stream in variants.values():
            _through(layer, stream)
        for kind, student, matrix in _futures(layer, layer_idx, given, store):
            changed = copy_stream(check, spill=store.folder)
            for rows in batches(len(changed)):
                x = layer.input_norm(changed[rows])
                after = changed[rows] + student.features(x) @ matrix
                changed[rows] = after + layer.feed_forward(after)
            variants[kind, layer_idx] = changed
        _finish(layer, search, outputs)
        _through(layer, check)
    on_progress(ProgressEvent(STAGE, 100 * num_layers, 100 * num_layers, "%"))
    return _judge(teacher, check, variants, given)


def part_name(layer_idx: int) -> str:
    """Return the store's name of a layer's search."""
    return f"search-{layer_idx:04d}"


def future(
    kind: str, layer: DecoderLayer, layer_idx: int, given: StudyInput, store: CalibrationStore
) -> tuple[Student, torch.Tensor]:
    """Return a layer's mixer "kda" or "mla" as fitted, and its output matrix [F, D]."""
    part = store.tensors(part_name(layer_idx))
    assert layer.mla is not None
    device = layer.mla.o.weight.device
    if kind == "kda":
        parameters = {name: value.to(device) for name, value in part.items() if name != "lags"}
        return KdaStudent(given.config, parameters), parameters["kda.o.weight"].T
    lags = part["lags"].to(device) if given.fold else None
    return MlaStudent(given.config, layer.mla, lags), layer.mla.o.weight.float().T


def _futures(
    layer: DecoderLayer, layer_idx: int, given: StudyInput, store: CalibrationStore
) -> list[tuple[str, Student, torch.Tensor]]:
    return [(kind, *future(kind, layer, layer_idx, given, store)) for kind in ("kda", "mla")]


def _fit_layer(
    layer: DecoderLayer,
    layer_idx: int,
    x: torch.Tensor,
    y: torch.Tensor,
    given: StudyInput,
    start: Start,
    store: CalibrationStore,
    told: Callable[[int, int], None],
) -> None:
    """Search one layer's mixer and put it into the store."""
    assert layer.mla is not None
    statistics = layer_statistics(layer.mla, x)
    result = start(statistics, x, y, given.config, layer_idx, told)
    student = KdaStudent(given.config, {**result.parameters, "kda.o.weight": x.new_zeros(0)})
    parts = [moments(student.features(x[rows]), y[rows]) for rows in groups(len(x))]
    fitted = fit_ridge(parts)
    store.save(
        part_name(layer_idx),
        {**student.parameters(), "kda.o.weight": fitted.solution.T, "lags": statistics.lags},
        {**result.record, "error": fitted.error, "penalty": fitted.penalty, **_notes(statistics)},
    )


def _notes(statistics: LayerStatistics) -> dict[str, object]:
    return {
        "constant_row_error": statistics.constant_error,
        "sink": statistics.sink.tolist(),
        "entropy": statistics.entropy.tolist(),
    }


def _mixer_io(layer: DecoderLayer, stream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the normalised inputs and the outputs of a layer's mixer, [N, T, D] each."""
    inputs = torch.cat([layer.input_norm(stream[rows]) for rows in batches(len(stream))])
    outputs = torch.cat([layer.mix(stream[rows]) for rows in batches(len(stream))])
    return inputs, outputs


def _through(layer: DecoderLayer, stream: torch.Tensor) -> None:
    for rows in batches(len(stream)):
        stream[rows] = layer(stream[rows])


def _finish(layer: DecoderLayer, stream: torch.Tensor, mixed: torch.Tensor) -> None:
    for rows in batches(len(stream)):
        after = stream[rows] + mixed[rows]
        stream[rows] = after + layer.feed_forward(after)


def _judge(
    teacher: LayerLoader,
    check: torch.Tensor,
    variants: Mapping[tuple[str, int], torch.Tensor],
    given: StudyInput,
) -> Study:
    head = teacher.head()
    log_probs = torch.cat(
        [head(check[rows]).log_softmax(-1).half() for rows in batches(len(check))]
    )
    kls: dict[str, dict[int, float]] = {"kda": {}, "mla": {}}
    for (kind, layer_idx), stream in variants.items():
        kls[kind][layer_idx] = divergence(head, stream, log_probs)
    return Study(
        kl_as_kda=kls["kda"],
        kl_as_mla=kls["mla"],
        log_probs=log_probs,
        tokens=given.validation_tokens,
    )


def divergence(
    head: Callable[[torch.Tensor], torch.Tensor], stream: torch.Tensor, log_probs: torch.Tensor
) -> float:
    """Return KL(teacher || student) in nats per token, over rows of a last hidden stream."""
    total = 0.0
    for rows in batches(len(stream)):
        guide = log_probs[rows].float()
        student = head(stream[rows]).log_softmax(-1)
        total += float((guide.exp() * (guide - student)).sum())
    return total / (stream.shape[0] * stream.shape[1])


def _told(
    on_progress: ProgressCallback, layer_idx: int, num_layers: int
) -> Callable[[int, int], None]:
    def told(done: int, total: int) -> None:
        now = 100 * layer_idx + 100 * done // max(total, 1)
        on_progress(ProgressEvent(STAGE, now, 100 * num_layers, "%", f"layer {layer_idx}"))

    return told
