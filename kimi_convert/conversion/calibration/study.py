"""The first pass: every layer of the teacher is measured, and both of its futures tried out.

For each layer the mixer is searched as if it were converted, and folded as if it were kept. Each
of the two then replaces the teacher's mixer alone, and the changed stream runs on through the
teacher: what it costs at the output, in KL, is what the choice of layers goes by.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import torch

from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.progress import ProgressCallback, ProgressEvent
from kimi_convert.conversion.calibration.ahead import SearchPool, layers_ahead
from kimi_convert.conversion.calibration.cost import search_bytes
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
from kimi_convert.conversion.calibration.students import (
    KdaStudent,
    MlaStudent,
    Student,
    kept_output,
    kept_parameters,
)
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
    futures = _Futures(
        given, store, make_stream(given.validation_tokens, embed, spill=store.folder)
    )
    num_layers = teacher.config.num_layers

    def told(layers: float) -> None:
        done = int(100 * layers)
        on_progress(
            ProgressEvent(
                STAGE, done, 100 * num_layers, "%", f"{int(layers)} of {num_layers} layers"
            )
        )

    width = layers_ahead(
        search.device, search_bytes=search_bytes(given.config, given.search_tokens.numel())
    )
    with SearchPool(width, on_progress=told) as pool:
        running: deque[tuple[int, DecoderLayer, Future[None]]] = deque()
        for layer_idx in range(num_layers):
            layer = teacher.layer(layer_idx)
            inputs, outputs = _mixer_io(layer, search)
            fit = partial(_fit_layer, layer, layer_idx, inputs, outputs, given, start, store)
            running.append((layer_idx, layer, pool.start(layer_idx, fit)))
            _finish(layer, search, outputs)
            if len(running) == pool.width:
                futures.try_out(*running.popleft())
        while running:
            futures.try_out(*running.popleft())
    on_progress(ProgressEvent(STAGE, 100 * num_layers, 100 * num_layers, "%"))
    return _judge(teacher, futures.check, futures.variants, given)


class _Futures:
    """What becomes of the validation stream with one layer replaced, for every layer and kind."""

    def __init__(self, given: StudyInput, store: CalibrationStore, check: torch.Tensor) -> None:
        self.check = check
        self.variants: dict[tuple[str, int], torch.Tensor] = {}
        self._given = given
        self._store = store

    def try_out(self, layer_idx: int, layer: DecoderLayer, fitted: Future[None]) -> None:
        """Take every stream through a layer, and both of its futures through it alone."""
        fitted.result()
        for stream in self.variants.values():
            _through(layer, stream)
        for kind in ("kda", "mla"):
            student, matrix = future(kind, layer, layer_idx, self._given, self._store)
            changed = copy_stream(self.check, spill=self._store.folder)
            for rows in batches(len(changed)):
                x = layer.input_norm(changed[rows])
                after = changed[rows] + student.features(x) @ matrix
                changed[rows] = after + layer.feed_forward(after)
            self.variants[kind, layer_idx] = changed
        _through(layer, self.check)


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
    student = MlaStudent(given.config, kept_parameters(given.config, layer.mla, lags))
    return student, kept_output(given.config, layer.mla)


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
    """Search one layer's mixer and put it into the store, if it is not there."""
    if store.has(part_name(layer_idx)):
        return
    assert layer.mla is not None
    with errors_of_layer(layer_idx):
        statistics = layer_statistics(layer.mla, x)
        result = start(statistics, x, y, given.config, layer_idx, told)
        student = KdaStudent(given.config, result.parameters)
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
    logits = check.shape[1] * teacher.config.vocab_size
    runs = batches(len(check), values_per_row=logits)
    log_probs = torch.cat([head(check[rows]).log_softmax(-1).half() for rows in runs])
    kls: dict[str, dict[int, float]] = {"kda": {}, "mla": {}}
    for (kind, layer_idx), stream in variants.items():
        kls[kind][layer_idx] = float(divergences(head, stream, log_probs).mean())
    return Study(
        kl_as_kda=kls["kda"],
        kl_as_mla=kls["mla"],
        log_probs=log_probs,
        tokens=given.validation_tokens,
    )


def divergences(
    head: Callable[[torch.Tensor], torch.Tensor], stream: torch.Tensor, log_probs: torch.Tensor
) -> torch.Tensor:
    """Return KL(teacher || student) of every row [n] of a last hidden stream, nats per token."""
    found: list[torch.Tensor] = []
    for rows in batches(len(stream), values_per_row=log_probs[0].numel()):
        guide = log_probs[rows].float()
        student = head(stream[rows]).log_softmax(-1)
        found.append((guide.exp() * (guide - student)).sum(-1).double().mean(-1).cpu())
    return torch.cat(found)
