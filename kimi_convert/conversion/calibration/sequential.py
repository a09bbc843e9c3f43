"""The second pass: output matrices solved in order, on what the student itself hands down.

Each layer sees the student's residual stream, errors of earlier layers included, and its output
matrix is solved for what would bring that stream back to the teacher's:

    W = argmin |h_teacher,after mixer - h_student,before - Z W|^2

Kept layers take part. A solve that does worse than no mixer at all on tokens that it did not see
is replaced by the teacher-forced one, or by nothing, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.calibration import AlignRecipe
from kimi_convert.config.progress import ProgressCallback, ProgressEvent
from kimi_convert.conversion.calibration.align import align_mixer
from kimi_convert.conversion.calibration.calibration_text import CalibrationText
from kimi_convert.conversion.calibration.dynamics import dynamics_of
from kimi_convert.conversion.calibration.head_errors import head_errors
from kimi_convert.conversion.calibration.layer_errors import errors_of_layer
from kimi_convert.conversion.calibration.outcome import Outcome, outcome_of
from kimi_convert.conversion.calibration.outputs import solve_output
from kimi_convert.conversion.calibration.store import CalibrationStore
from kimi_convert.conversion.calibration.streams import advance, batches, make_stream
from kimi_convert.conversion.calibration.students import (
    KdaStudent,
    MlaStudent,
    Student,
    kept_output,
    kept_parameters,
)
from kimi_convert.conversion.calibration.study import part_name
from kimi_convert.model.block import DecoderLayer
from kimi_convert.model.loading import LayerLoader
from kimi_convert.model.router_agreement import RouterAgreement, chosen_experts

_STAGE = "solving outputs"


@dataclass(frozen=True, slots=True, kw_only=True)
class SequentialInput:
    """What the second pass works with."""

    config: ModelConfig  # of the hybrid, with the layers that it keeps
    text: CalibrationText
    fold: bool
    align: AlignRecipe
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SolvedStudent:
    """What the whole student is worth on validation tokens."""

    outcome: Outcome
    router_agreement: tuple[float | None, ...]  # per layer, of experts in common; None where dense


def solve_in_order(
    teacher: LayerLoader,
    given: SequentialInput,
    store: CalibrationStore,
    on_progress: ProgressCallback,
) -> SolvedStudent:
    """Go through both models once. Layers that the store has are not solved again."""
    tokens = given.text.inputs
    embed = teacher.embedding()
    guide = make_stream(tokens, embed, spill=store.folder)
    stream = make_stream(tokens, embed, spill=store.folder)
    num_layers = teacher.config.num_layers
    check = slice(len(tokens) - given.text.validation_rows, None)
    agreements: list[RouterAgreement] = []
    for layer_idx in range(num_layers):
        on_progress(ProgressEvent(_STAGE, layer_idx, num_layers, "layers"))
        layer = teacher.layer(layer_idx)
        mixed = torch.cat([layer.mix(guide[rows]) for rows in batches(len(guide))])
        name = fitted_name(layer_idx)
        if not store.has(name):
            with errors_of_layer(layer_idx):
                _Solver(layer, layer_idx, given, store).solve(guide, stream, mixed)
        part = store.tensors(name)
        student, matrix = fitted_student(layer, layer_idx, part, given)
        agreements.append(RouterAgreement())
        for rows in batches(len(stream)):
            output = student.features(layer.input_norm(stream[rows])) @ matrix
            with chosen_experts(layer) as found:
                advance(stream, layer, output, rows)
            with chosen_experts(layer) as expected:
                advance(guide, layer, mixed[rows], rows)
            unchecked = max(0, check.start - rows.start) * tokens.shape[1]
            agreements[-1].add(
                [one[unchecked:] for one in found], [one[unchecked:] for one in expected]
            )
    on_progress(ProgressEvent(_STAGE, num_layers, num_layers, "layers"))
    return SolvedStudent(
        outcome=outcome_of(teacher.head(), guide[check], stream[check], given.text.tokens[check]),
        router_agreement=tuple(one.value for one in agreements),
    )


def fitted_name(layer_idx: int) -> str:
    """Return the store's name of a layer's final parameters."""
    return f"fitted-{layer_idx:04d}"


def fitted_student(
    layer: DecoderLayer,
    layer_idx: int,
    part: Mapping[str, torch.Tensor],
    given: SequentialInput,
) -> tuple[Student, torch.Tensor]:
    """Return a stored layer's mixer and its output matrix [F, D]."""
    student = _without_output(layer, layer_idx, part, given)
    assert layer.mla is not None
    device = layer.mla.o.weight.device
    return student, part[f"{student.prefix}o.weight"].to(device).T


class _Solver:
    """One layer."""

    def __init__(
        self, layer: DecoderLayer, layer_idx: int, given: SequentialInput, store: CalibrationStore
    ) -> None:
        self.layer = layer
        self.layer_idx = layer_idx
        self.given = given
        self.store = store

    def solve(self, guide: torch.Tensor, stream: torch.Tensor, mixed: torch.Tensor) -> None:
        """Solve, judge and store one layer."""
        searched = self.store.tensors(part_name(self.layer_idx))
        student = _without_output(self.layer, self.layer_idx, searched, self.given)
        rows = len(stream) - self.given.text.validation_rows
        assert self.layer.mla is not None
        x = torch.cat([self.layer.input_norm(stream[part]) for part in batches(len(stream))])
        aim = guide + mixed - stream
        forced = self._forced(searched, student)
        aligned = self._align(student, forced, x[:rows], aim[:rows])
        z = student.features(x)
        solved = solve_output(
            z,
            aim,
            validation_rows=self.given.text.validation_rows,
            others={"teacher-forced": forced},
            dtype=getattr(torch, self.given.config.dtype),
        )
        after = (guide[rows:] + mixed[rows:]).double().square().sum()
        stream_error = solved.nearness.error * solved.target_power / float(after)
        self.store.save(
            fitted_name(self.layer_idx),
            {**student.parameters(), f"{student.prefix}o.weight": solved.matrix.T},
            {
                "mixer": student.prefix[:-1],
                **solved.to_record(),
                "stream_error": stream_error,
                "heads": head_errors(
                    self.layer.mla, self.layer.input_norm(guide[rows:]), z[rows:]
                ),
                **dynamics_of(student, x[rows:]),
                **aligned,
            },
        )

    def _align(
        self, student: Student, forced: torch.Tensor, x: torch.Tensor, aim: torch.Tensor
    ) -> Mapping[str, object]:
        recipe = self.given.align
        if not recipe.steps:
            return {}
        trained = align_mixer(student, forced, x, aim, recipe, seed=self.given.seed)
        return trained.to_record()

    def _forced(self, searched: Mapping[str, torch.Tensor], student: Student) -> torch.Tensor:
        assert self.layer.mla is not None
        if student.prefix == "kda.":
            return searched["kda.o.weight"].to(self.layer.mla.o.weight.device).T
        return kept_output(self.given.config, self.layer.mla)


def _without_output(
    layer: DecoderLayer,
    layer_idx: int,
    part: Mapping[str, torch.Tensor],
    given: SequentialInput,
) -> Student:
    assert layer.mla is not None
    device = layer.mla.o.weight.device
    if layer_idx in given.config.kda_layers:
        return KdaStudent(given.config, {name: value.to(device) for name, value in part.items()})
    lags = part["lags"].to(device) if given.fold and "lags" in part else None
    kept = kept_parameters(given.config, layer.mla, lags)
    fitted = {name: value.to(device) for name, value in part.items() if name in kept}
    return MlaStudent(given.config, {**kept, **fitted})
