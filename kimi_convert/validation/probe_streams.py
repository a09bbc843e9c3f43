"""Run the probes of `recall` through teacher and student, a layer at a time, beside the text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from kimi_convert.model.block import DecoderLayer
from kimi_convert.validation.metrics import token_slices
from kimi_convert.validation.recall import (
    ProbeTokens,
    copying_probe,
    induction_probe,
    pairs_probe,
)
from kimi_convert.validation.report import ProbeResult

# Enough answers for a standard error of 2 to 4 % of all at most, in some 8000 tokens together.
_SPAN, _SPANS = 64, 16
_BEFORE, _LOOKUPS = 64, 48
_PAIRS, _LISTS = 16, 16
_LEAST_IDS = 4  # that a probe can be drawn from
_LOGITS_BYTES = 32 * 1024 * 1024

Head = Callable[[torch.Tensor], torch.Tensor]  # hidden [n, D] -> logits [n, vocab]


@dataclass(frozen=True, slots=True, kw_only=True)
class SizedProbe:
    """A probe, and what it is called in a report."""

    name: str
    size: int
    probe: ProbeTokens


def probes_of(token_ids: torch.Tensor, *, seed: int) -> tuple[SizedProbe, ...]:
    """Return the probes that can be drawn from some ids [n], smaller where they are few."""
    count = len(token_ids)
    if count < _LEAST_IDS:
        return ()
    span, before, pairs = min(_SPAN, count), min(_BEFORE, count), min(_PAIRS, count // 2)
    copying = copying_probe(token_ids, span=span, rows=_SPANS, seed=seed)
    induction = induction_probe(token_ids, length=before, rows=_LOOKUPS, seed=seed)
    recall = pairs_probe(token_ids, pairs=pairs, rows=_LISTS, seed=seed)
    return (
        SizedProbe(name="copying", size=span, probe=copying),
        SizedProbe(name="induction", size=before, probe=induction),
        SizedProbe(name="pairs", size=pairs, probe=recall),
    )


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


def accuracy(probe: ProbeTokens, hidden: torch.Tensor, head: Head) -> float:
    """Return the share of answers that are the most likely token after hidden [N, T, D]."""
    asked, answers = hidden[probe.asked.to(hidden.device)], probe.answers.to(hidden.device)
    width = head(asked[:1]).shape[-1]
    right = 0
    for run in token_slices(len(asked), vocab_size=width, max_bytes=_LOGITS_BYTES):
        right += int((head(asked[run]).argmax(-1) == answers[run]).sum())
    return right / len(answers)
