"""Which tokens a checkpoint is measured on: a text in the model's own ids, or random ids.

Also holds teacher and student against each other before anything runs: they can be compared only
on a vocabulary that they share.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from kimi_convert.checkpoints.hashing import sha256_of_file
from kimi_convert.config.architecture import ModelConfig
from kimi_convert.errors import CheckpointError
from kimi_convert.model.text import PackedText, pack_documents, read_documents
from kimi_convert.model.tokenizer import Tokenizer, load_tokenizer, tokenizer_files
from kimi_convert.validation.options import ValidationOptions
from kimi_convert.validation.report import TextSample

# Sequences that forms are compared on; more than one, so that batches are seen.
_COMPARED_ROWS = 2
_COMPARED_DOCUMENTS = 4
_COMPARED_CHARACTERS = 4096
_SAME_SHAPE = ("vocab_size", "num_layers", "hidden_size")


@dataclass(frozen=True, slots=True)
class Sample:
    """A packed text and what a report says of it."""

    packed: PackedText
    facts: TextSample


def read_sample(
    path: Path,
    *,
    checkpoint: Path,
    teacher: Path | None,
    vocab_size: int,
    options: ValidationOptions,
) -> Sample:
    """Read a text with the tokenizer of the checkpoint, or the teacher's if it has none.

    Raises:
        InputError: the text or a tokenizer is not valid, or too short for one sequence.
        CheckpointError: teacher and checkpoint have tokenizers that give other ids.
    """
    folders = (checkpoint,) if teacher is None else (checkpoint, teacher)
    tokenizers = [load_tokenizer(folder) for folder in folders if tokenizer_files(folder)]
    if len(tokenizers) > 1:
        _check_same_ids(path, *tokenizers)
    tokenizer = tokenizers[0] if tokenizers else None
    separators = tokenizer.eos_token_ids if tokenizer else ()
    packed = pack_documents(
        read_documents(path),
        tokenizer,
        sequence_length=options.sequence_length,
        separator_id=separators[0] if separators else None,
        vocab_size=vocab_size,
        max_tokens=options.max_tokens,
        max_tokens_per_kind=options.max_tokens_per_kind,
    )
    sequences, length = packed.tokens[:, 1:].shape
    facts = TextSample(
        path=str(path),
        sha256=sha256_of_file(path),
        sequences=sequences,
        sequence_length=length,
        tokens=sequences * length,
        tokens_by_kind={kind: n * length for kind, n in Counter(packed.kinds).items()},
        left_over=packed.left_over,
    )
    return Sample(packed, facts)


def random_tokens(vocab_size: int, options: ValidationOptions) -> torch.Tensor:
    """Return token ids [2, consistency_tokens] that depend on the seed alone."""
    generator = torch.Generator().manual_seed(options.seed)
    shape = (_COMPARED_ROWS, options.consistency_tokens)
    return torch.randint(vocab_size, shape, generator=generator)


def leading_tokens(sample: Sample, options: ValidationOptions) -> torch.Tensor:
    """Return the first tokens of the first sequences, [<= 2, <= consistency_tokens]."""
    return sample.packed.tokens[:_COMPARED_ROWS, : options.consistency_tokens]


def check_comparable(student: ModelConfig, teacher: ModelConfig, *, where: object) -> None:
    """Check that a student and its teacher have the same vocabulary, depth and width.

    Raises:
        CheckpointError: they do not; the message names the field.
    """
    for name in _SAME_SHAPE:
        expected, found = getattr(student, name), getattr(teacher, name)
        if expected != found:
            raise CheckpointError(
                f"teacher and checkpoint differ in {name}, so they cannot be compared",
                where=where,
                expected=expected,
                found=found,
                hint="Give the checkpoint that this one was converted from as the teacher.",
            )


def _check_same_ids(path: Path, student: Tokenizer, teacher: Tokenizer) -> None:
    for document in islice(read_documents(path), _COMPARED_DOCUMENTS):
        text = (document.text or "")[:_COMPARED_CHARACTERS]
        if student.encode(text) != teacher.encode(text):
            raise CheckpointError(
                "teacher and checkpoint have tokenizers that differ, so they cannot be compared",
                where=document.where or path,
                hint="Give the checkpoint that this one was converted from as the teacher.",
            )
