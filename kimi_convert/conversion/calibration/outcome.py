"""How near a fitted student is to its teacher on tokens that fitted nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch

from kimi_convert.conversion.calibration.streams import batches
from kimi_convert.model.positions import position_ranges


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Means over the validation tokens."""

    tokens: int
    kl: float  # KL(teacher || student), nats per token
    teacher_loss: float  # nats per token
    student_loss: float
    top1_agreement: float  # share of tokens with the same most likely next token
    kl_by_position: Mapping[str, float]  # by the tokens before: "64 to 255" -> nats per token

    def to_json(self) -> dict[str, object]:
        """Return the fields."""
        return asdict(self)


def outcome_of(
    head: Callable[[torch.Tensor], torch.Tensor],
    guide: torch.Tensor,
    stream: torch.Tensor,
    tokens: torch.Tensor,
    *,
    student_head: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Outcome:
    """Compare the last hidden streams [n, T, D] of both models.

    Args:
        head: hidden states to logits; of both models, unless the student's is given.
        guide: the teacher's.
        stream: the student's.
        tokens: [n, T + 1], inputs and the token after the last.
        student_head: where the student has one of its own.
    """
    teacher = student = agreed = 0.0
    kl = torch.zeros(guide.shape[1], dtype=torch.float64)  # by position
    logits = guide.shape[1] * head(guide[:1, :1]).shape[-1]
    for rows in batches(len(guide), values_per_row=logits):
        expected = head(guide[rows]).log_softmax(-1)
        found = (student_head or head)(stream[rows]).log_softmax(-1)
        targets = tokens[rows, 1:].to(found.device).unsqueeze(-1)
        kl += (expected.exp() * (expected - found)).sum((0, 2), dtype=torch.float64).cpu()
        teacher -= float(expected.gather(-1, targets).sum())
        student -= float(found.gather(-1, targets).sum())
        agreed += float((expected.argmax(-1) == found.argmax(-1)).sum())
    count = guide.shape[0] * guide.shape[1]
    return Outcome(
        tokens=count,
        kl=float(kl.sum()) / count,
        teacher_loss=teacher / count,
        student_loss=student / count,
        top1_agreement=agreed / count,
        kl_by_position={
            f"{start} to {stop - 1}": float(kl[start:stop].mean()) / len(guide)
            for start, stop in position_ranges(guide.shape[1])
        },
    )
