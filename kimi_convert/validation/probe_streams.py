"""Run the probes of `recall` through teacher and student, a layer at a time, beside the text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from kimi_convert.model.block import DecoderLayer
from kimi_convert.model.recall import Head, ProbeResult, SizedProbe, accuracy


@dataclass(slots=True)
class ProbeStreams:
    """The hidden states [N, T, D] of the probes in both models, replaced layer by layer."""

    probes: Sequence[SizedProbe]
    batch_rows: int
    student: list[torch.Tensor] = field(default_factory=list)
    teacher: list[torch.Tensor] = field(default_factory=list)  # empty without one

    def embed(self, student: nn.Module, teacher: nn.Module | None, device: torch.device) -> None:
        """Begin with the embeddings of both models."""
        for one in self.probes:
            tokens = one.probe.inputs.to(device)
            self.student.append(student(tokens))
            if teacher is not None:
                self.teacher.append(teacher(tokens))

    def advance(self, student: DecoderLayer, teacher: DecoderLayer | None) -> None:
        """Take every probe through a layer of each model."""
        self._through(student, self.student)
        if teacher is not None:
            self._through(teacher, self.teacher)

    def results(self, student: Head, teacher: Head | None) -> Iterator[ProbeResult]:
        """Yield how many answers each model gives."""
        for number, one in enumerate(self.probes):
            yield ProbeResult(
                name=one.name,
                size=one.size,
                answers=len(one.probe.answers),
                student=accuracy(one.probe, self.student[number], student),
                teacher=None
                if teacher is None
                else accuracy(one.probe, self.teacher[number], teacher),
            )

    def _through(self, layer: DecoderLayer, streams: list[torch.Tensor]) -> None:
        for stream in streams:
            for rows in stream.split(self.batch_rows):
                rows.copy_(layer(rows))
