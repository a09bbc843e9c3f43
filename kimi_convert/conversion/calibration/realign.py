"""Align a hybrid that exists: every mixer trained and its output solved again, layer by layer.

Both models run, a layer of each in memory. With targets from the stream, each layer sees what the
student itself hands down and aims at what would bring that back to the teacher's; teacher-forced,
it sees the teacher's stream and aims at the teacher's mixer. A layer that ends further from its
target than it was, on tokens that it did not see, stays as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import torch

from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.calibration import AlignRecipe
from kimi_convert.config.progress import ProgressCallback, ProgressEvent
from kimi_convert.conversion.calibration.align import align_mixer
from kimi_convert.conversion.calibration.calibration_text import CalibrationText
from kimi_convert.conversion.calibration.layer_errors import errors_of_layer
from kimi_convert.conversion.calibration.outcome import Outcome, outcome_of
from kimi_convert.conversion.calibration.outputs import solve_output
from kimi_convert.conversion.calibration.ridge import moments
from kimi_convert.conversion.calibration.store import CalibrationStore
from kimi_convert.conversion.calibration.streams import advance, batches, make_stream
from kimi_convert.conversion.calibration.students import KdaStudent, MlaStudent, Student
from kimi_convert.model.block import DecoderLayer
from kimi_convert.model.loading import LayerLoader

_STAGE = "aligning layers"
AS_IT_WAS = "as it was"


class Targets(StrEnum):
    """What every layer is aligned to."""

    SEQUENTIAL = "sequential"  # the teacher's stream, from the student's own
    FORCED = "forced"  # the teacher's mixer, on the teacher's stream


@dataclass(frozen=True, slots=True, kw_only=True)
class RealignInput:
    """What is aligned, to what, on what."""

    config: ModelConfig  # of the student
    text: CalibrationText
    recipe: AlignRecipe
    targets: Targets
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerAlignment:
    """One layer, counted from 0; distances from its target on validation tokens."""

    layer_idx: int
    mixer: str  # "kda" or "mla"
    error_before: float  # |y - Z W|^2 / |y|^2
    error: float
    cosine: float
    norm_ratio: float
    output: str  # "solved", or "as it was" where alignment did not help
    first_loss: float  # a mean over the first steps
    last_loss: float
    tokens: int  # drawn

    def to_json(self) -> dict[str, object]:
        """Return the fields."""
        document = asdict(self)
        return {"layer": document.pop("layer_idx"), **document}


@dataclass(frozen=True, slots=True, kw_only=True)
class RealignOutcome:
    """The whole student before and after, on validation tokens."""

    before: Outcome
    after: Outcome


@dataclass(frozen=True, slots=True)
class _Streams:
    """The residual streams: [N, T, D] of both models, and the student's as it was, checked rows."""

    guide: torch.Tensor
    student: torch.Tensor
    unchanged: torch.Tensor


def realign(
    teacher: LayerLoader,
    student: LayerLoader,
    given: RealignInput,
    store: CalibrationStore,
    on_progress: ProgressCallback,
) -> RealignOutcome:
    """Go through both models once. Layers that the store has are not aligned again.

    Raises:
        VerificationError: alignment diverges; the layer is named, finished ones are kept.
        CalibrationError: a solve is not finite.
    """
    tokens = given.text.inputs
    check = slice(len(tokens) - given.text.validation_rows, None)
    embed = student.embedding()
    streams = _Streams(
        make_stream(tokens, teacher.embedding(), spill=store.folder),
        make_stream(tokens, embed, spill=store.folder),
        make_stream(tokens[check], embed, spill=store.folder),
    )
    num_layers = given.config.num_layers
    for layer_idx in range(num_layers):
        on_progress(ProgressEvent(_STAGE, layer_idx, num_layers, "layers"))
        _Layer(
            teacher.layer(layer_idx), student.layer(layer_idx), layer_idx, given, store
        ).take_through(streams)
    on_progress(ProgressEvent(_STAGE, num_layers, num_layers, "layers"))
    expected, rows = streams.guide[check], given.text.tokens[check]
    head, own = teacher.head(), student.head()
    return RealignOutcome(
        before=outcome_of(head, expected, streams.unchanged, rows, student_head=own),
        after=outcome_of(head, expected, streams.student[check], rows, student_head=own),
    )


def layer_alignment(store: CalibrationStore, layer_idx: int) -> LayerAlignment:
    """Return what was noted of a finished layer."""
    fields: dict[str, Any] = store.record(aligned_name(layer_idx))  # of its own `asdict`
    return LayerAlignment(**fields)


def aligned_name(layer_idx: int) -> str:
    """Return the store's name of a layer's final parameters."""
    return f"aligned-{layer_idx:04d}"


class _Layer:
    """One layer of both models."""

    def __init__(
        self,
        teacher: DecoderLayer,
        student: DecoderLayer,
        layer_idx: int,
        given: RealignInput,
        store: CalibrationStore,
    ) -> None:
        self.teacher = teacher
        self.student = student
        self.layer_idx = layer_idx
        self.given = given
        self.store = store

    def take_through(self, streams: _Streams) -> None:
        """Align the layer unless that is done, and run every stream through it."""
        guide, stream = streams.guide, streams.student
        mixed = torch.cat([self.teacher.mix(guide[rows]) for rows in batches(len(guide))])
        name = aligned_name(self.layer_idx)
        if not self.store.has(name):
            with errors_of_layer(self.layer_idx):
                self._align(guide, stream, mixed)
        part = self.store.tensors(name)
        mixer = mixer_of(self.given.config, {n: v.to(mixed.device) for n, v in part.items()})
        matrix = part[f"{mixer.prefix}o.weight"].to(mixed.device).T
        for rows in batches(len(stream)):
            x = self.student.input_norm(stream[rows])
            advance(stream, self.student, mixer.features(x) @ matrix, rows)
            advance(guide, self.teacher, mixed[rows], rows)
        for rows in batches(len(streams.unchanged)):
            before = self.student.mix(streams.unchanged[rows])
            advance(streams.unchanged, self.student, before, rows)

    def _align(self, guide: torch.Tensor, stream: torch.Tensor, mixed: torch.Tensor) -> None:
        forced = self.given.targets is Targets.FORCED
        seen = guide if forced else stream
        x = torch.cat([self.student.input_norm(seen[rows]) for rows in batches(len(seen))])
        aim = mixed if forced else guide + mixed - stream
        rows = len(x) - self.given.text.validation_rows
        was = parameters_of(self.student)
        mixer = mixer_of(self.given.config, was)
        output = f"{mixer.prefix}o.weight"
        old = was[output].float().T
        before = moments(mixer.features(x[rows:]), aim[rows:]).nearness(old.double())
        note = align_mixer(
            mixer, old, x[:rows], aim[:rows], self.given.recipe, seed=self.given.seed
        )
        solved = solve_output(
            mixer.features(x),
            aim,
            validation_rows=self.given.text.validation_rows,
            others={},
            dtype=getattr(torch, self.given.config.dtype),
        )
        better = solved.nearness.error < before.error
        near = solved.nearness if better else before
        first, last = note.losses
        result = LayerAlignment(
            layer_idx=self.layer_idx,
            mixer=mixer.prefix[:-1],
            error_before=before.error,
            error=near.error,
            cosine=near.cosine,
            norm_ratio=near.norm_ratio,
            output=solved.name if better else AS_IT_WAS,
            first_loss=first,
            last_loss=last,
            tokens=note.tokens,
        )
        found = {**mixer.parameters(), output: solved.matrix.T} if better else was
        self.store.save(aligned_name(self.layer_idx), found, asdict(result))


def mixer_of(config: ModelConfig, parameters: Mapping[str, torch.Tensor]) -> Student:
    """Return a mixer of a hybrid from its parameters, named as in a layer."""
    kinds = {"kda": KdaStudent, "mla": MlaStudent}
    (kind,) = {name.split(".")[0] for name in parameters}
    return kinds[kind](config, parameters)


def parameters_of(layer: DecoderLayer) -> dict[str, torch.Tensor]:
    """Return a layer's mixer as a checkpoint names it, output matrix included, fp32."""
    mixers = {"kda": layer.kda, "mla": layer.mla}
    return {
        f"{kind}.{name}": value.detach().float()
        for kind, mixer in mixers.items()
        if mixer is not None
        for name, value in mixer.named_parameters()
    }
