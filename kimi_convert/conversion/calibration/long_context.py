"""Whether a choice of layers holds at contexts longer than the one that it was made at.

Layers that are bunched together could cost what lies further back than a calibration's sequences
are long. So the chosen set and the released pattern are compared once more on tokens of one
stretch of text, joined to longer sequences, by the tokens in the last half of each; the longest
counts of those that the teacher handles: there, more context does not make the same tokens harder
for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from kimi_convert.config.progress import ProgressCallback, ProgressEvent
from kimi_convert.conversion.calibration.choice import KeptLayers
from kimi_convert.conversion.calibration.store import CalibrationStore
from kimi_convert.conversion.calibration.streams import advance, batches, copy_stream, make_stream
from kimi_convert.conversion.calibration.study import StudyInput, future
from kimi_convert.model.loading import LayerLoader

_STAGE = "comparing long contexts"
_TIMES = (2, 4)  # of a calibration's sequences
_SLACK = 0.02  # nats per token that the teacher's loss may rise by chance
_HEAD_TOKENS = 512  # whose logits exist at a time

Head = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class LongContext:
    """What sets of kept layers are worth there."""

    length: int  # tokens
    kl_of: Mapping[KeptLayers, float]  # nats per token, in the last half, before the second pass

    def to_json(self) -> dict[str, object]:
        """Return the fields."""
        sets = [{"kept": list(kept), "kl": kl} for kept, kl in self.kl_of.items()]
        return {"length": self.length, "sets": sets}


@torch.no_grad()
def compare_at_length(
    teacher: LayerLoader,
    given: StudyInput,
    sets: Sequence[KeptLayers],
    text: torch.Tensor,
    store: CalibrationStore,
    on_progress: ProgressCallback,
) -> LongContext | None:
    """Run teacher and students at every length, and compare at the longest that counts.

    Args:
        teacher: the source.
        given: of the study.
        sets: layers that stay.
        text: [m, T + 1], rows of a calibration that follow each other, each with the next's first
            token.
        store: with searched layers.
        on_progress: told of layers.

    Returns:
        None where no longer sequence can be made, or the teacher handles none.
    """
    tokens, targets = text[:, :-1].flatten(), text[:, 1:].flatten()
    short = text.shape[1] - 1
    lengths = [
        length
        for length in (times * short for times in _TIMES)
        if length <= min(teacher.config.max_positions, len(tokens))
    ]
    if not lengths:
        return None
    alone = _Run(tokens.view(-1, short), (), teacher, store)
    runs = [
        _Run(tokens[: len(tokens) // n * n].view(-1, n), sets, teacher, store) for n in lengths
    ]
    _go_through(teacher, given, (alone, *runs), store, on_progress)
    head, found = teacher.head(), None
    with_less = alone.losses(head, targets)
    for run in runs:
        shape = run.guide.shape[:2]
        loss = _last_half(run.losses(head, targets), shape).mean()
        if loss > _last_half(with_less, shape).mean() + _SLACK:
            break
        found = LongContext(
            length=run.guide.shape[1], kl_of={kept: run.divergence(head, kept) for kept in sets}
        )
    return found


def _go_through(
    teacher: LayerLoader,
    given: StudyInput,
    runs: Sequence[_Run],
    store: CalibrationStore,
    on_progress: ProgressCallback,
) -> None:
    """Take the teacher's stream and every student's of all runs through the layers."""
    num_layers = teacher.config.num_layers
    for layer_idx in range(num_layers):
        on_progress(ProgressEvent(_STAGE, layer_idx, num_layers, "layers"))
        layer = teacher.layer(layer_idx)
        for kind in ("mla", "kda"):
            student, matrix = future(kind, layer, layer_idx, given, store)
            for stream in (
                stream
                for run in runs
                for kept, stream in run.students.items()
                if (layer_idx in kept) == (kind == "mla")
            ):
                for rows in batches(len(stream)):
                    mixed = student.features(layer.input_norm(stream[rows])) @ matrix
                    advance(stream, layer, mixed, rows)
        for run in runs:
            for rows in batches(len(run.guide)):
                advance(run.guide, layer, layer.mix(run.guide[rows]), rows)
    on_progress(ProgressEvent(_STAGE, num_layers, num_layers, "layers"))


class _Run:
    """The streams [n, L, D] of one length."""

    def __init__(
        self,
        tokens: torch.Tensor,
        sets: Sequence[KeptLayers],
        teacher: LayerLoader,
        store: CalibrationStore,
    ) -> None:
        self.guide = make_stream(tokens, teacher.embedding(), spill=store.folder)
        self.students = {kept: copy_stream(self.guide, spill=store.folder) for kept in sets}

    def losses(self, head: Head, targets: torch.Tensor) -> torch.Tensor:
        """Return the teacher's loss of every token [n * L] in nats, fp64."""
        stream = self.guide.flatten(0, 1)
        aims = targets[: len(stream)].split(_HEAD_TOKENS)
        found = [
            -head(part).log_softmax(-1).gather(-1, aim.to(part.device)[:, None]).double()
            for part, aim in zip(stream.split(_HEAD_TOKENS), aims, strict=True)
        ]
        return torch.cat(found).flatten()

    def divergence(self, head: Head, kept: KeptLayers) -> float:
        """Return KL(teacher || student) on the last half of each sequence, nats per token."""
        total, count = 0.0, 0
        for expected, found in zip(
            self._last(self.guide), self._last(self.students[kept]), strict=True
        ):
            guide = head(expected).log_softmax(-1)
            total += float((guide.exp() * (guide - head(found).log_softmax(-1))).sum())
            count += len(found)
        return total / count

    def _last(self, stream: torch.Tensor) -> Sequence[torch.Tensor]:
        return stream[:, stream.shape[1] // 2 :].flatten(0, 1).split(_HEAD_TOKENS)


def _last_half(values: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return what stands at the last half of sequences [n, L] of a text."""
    rows, length = shape
    return values[: rows * length].view(rows, length)[:, length // 2 :]
