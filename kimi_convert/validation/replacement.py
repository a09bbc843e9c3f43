"""What each layer costs alone: the teacher with one layer of the student in its place.

Every layer begins a stream of its own where the teacher has come to, so a pass over both models is
enough; it is made on the first sequences, because there are as many streams as layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kimi_convert.model.block import DecoderLayer
from kimi_convert.validation.metrics import forward_kl, token_slices

TOKENS = 2048  # at most, but at least one sequence
_LOGITS_BYTES = 32 * 1024 * 1024


class Replacements:
    """The streams [n, T, D] of the teacher, each with one layer of the student in it."""

    def __init__(self, rows: int) -> None:
        """Take the first so many sequences."""
        self.rows = rows
        self._streams: list[torch.Tensor] = []

    def advance(self, student: DecoderLayer, teacher: DecoderLayer, guide: torch.Tensor) -> None:
        """Take every stream through the teacher's layer, and begin the one of this layer.

        Args:
            student: the layer that takes the teacher's place.
            teacher: the same layer of the teacher.
            guide: [N, T, D], the teacher's hidden state before it.
        """
        for stream in self._streams:
            stream.copy_(teacher(stream))
        self._streams.append(student(guide[: self.rows]))

    def divergences(
        self, head: Callable[[torch.Tensor], torch.Tensor], guide: torch.Tensor, *, vocab_size: int
    ) -> list[float]:
        """Return KL(teacher || teacher with a layer replaced) of each layer, nats per token.

        Args:
            head: the teacher's: hidden -> logits.
            guide: [N, T, D], the teacher's last hidden state.
            vocab_size: how long a row of logits is.
        """
        flat = guide[: self.rows].flatten(0, 1)
        totals = [0.0] * len(self._streams)
        for run in token_slices(len(flat), vocab_size=vocab_size, max_bytes=_LOGITS_BYTES):
            expected = head(flat[run]).log_softmax(-1)
            for layer_idx, stream in enumerate(self._streams):
                found = head(stream.flatten(0, 1)[run]).log_softmax(-1)
                totals[layer_idx] += forward_kl(expected, found).sum().item()
        return [total / len(flat) for total in totals]
