"""The hidden states of a text in teacher and student, from the embedding to the last layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from kimi_convert.config.architecture import ModelConfig
from kimi_convert.errors import CheckpointError, VerificationError
from kimi_convert.model.loading import LayerLoader
from kimi_convert.validation.activations import Activations, batches
from kimi_convert.validation.memory_need import memory_need
from kimi_convert.validation.options import Check, ValidationOptions


@dataclass(frozen=True, slots=True)
class TextStreams:
    """[N, T, D] of every model, replaced layer by layer."""

    student: Activations
    teacher: Activations | None
    ablated: Activations | None  # the student with converted mixers switched off

    def require_finite(self, checkpoint: Path, teacher: Path | None, layer_idx: int) -> None:
        """Check values after a layer.

        Raises:
            CheckpointError: the teacher's are not finite.
            VerificationError: the student's are not.
        """
        found = f"NaN or Inf after layer {layer_idx}"
        if self.teacher is not None and not self.teacher.finite:
            raise CheckpointError(
                "teacher gives values that are not finite",
                where=teacher,
                found=found,
                hint="Validate the teacher on its own, or compute in float32.",
            )
        if not self.student.finite:
            raise VerificationError(
                "checkpoint gives values that are not finite", where=checkpoint, found=found
            )


def embed_text(
    student: LayerLoader,
    teacher: LayerLoader | None,
    tokens: torch.Tensor,
    options: ValidationOptions,
    *,
    on_disk: bool | None,
) -> TextStreams:
    """Embed tokens [N, T] in every model.

    Args:
        student: the checkpoint.
        teacher: what it was made from, if it is compared.
        tokens: of the text.
        options: of the validation.
        on_disk: whether hidden states are kept in a file; None where memory is too small for them.

    Raises:
        ResourceError: they fit neither into memory nor on the disk.
    """
    if on_disk is None:
        configs = [student.config] if teacher is None else [student.config, teacher.config]
        on_disk = memory_need(configs, options, text_tokens=tokens.numel()).on_disk
    rows = options.batch_rows
    embedded = _embed(student, tokens, rows, on_disk=on_disk)
    converted = converted_layers(student.config, teacher.config if teacher else None)
    ablates = bool(converted) and Check.ABLATION in options.checks
    return TextStreams(
        student=embedded,
        teacher=_embed(teacher, tokens, rows, on_disk=on_disk) if teacher else None,
        ablated=embedded.clone(batch_rows=rows) if ablates else None,
    )


def converted_layers(student: ModelConfig, teacher: ModelConfig | None) -> frozenset[int]:
    """Return the layers that are KDA in the student and not in the teacher, from 0."""
    if teacher is None:
        return frozenset()
    return frozenset(student.kda_layers) - frozenset(teacher.kda_layers)


def _embed(
    model: LayerLoader, tokens: torch.Tensor, batch_rows: int, *, on_disk: bool
) -> Activations:
    embedding = model.embedding()
    shape = torch.Size((*tokens.shape, model.config.hidden_size))
    found = Activations(shape, dtype=model.dtype, device=model.device, on_disk=on_disk)
    for rows in batches(len(tokens), batch_rows):
        found.replace(rows, embedding(tokens[rows].to(model.device)))
    return found
