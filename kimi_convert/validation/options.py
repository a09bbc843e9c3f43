"""What `validate` is asked to do: which checks, on how much text, in which arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch

from kimi_convert.errors import UsageError
from kimi_convert.kernels.backend import Backend
from kimi_convert.model.numerics import SERVED, Numerics

DTYPES = ("float32", "bfloat16", "float16")
BACKENDS = (str(Backend.TORCH), str(Backend.TRITON))


class Check(StrEnum):
    """A part of validation that can be left out; names, shapes and dtypes are always checked."""

    VALUES = "values"  # NaN and Inf in any tensor
    HASHES = "hashes"  # files and tensors against what was recorded when they were written
    CONSISTENCY = "consistency"  # the same tokens in every form give the same logits
    QUALITY = "quality"  # loss on a text, and the distance to a teacher
    ABLATION = "ablation"  # the same with the converted mixers switched off
    REPLACEMENT = "replacement"  # the teacher with one layer of the checkpoint at a time
    PROBES = "probes"  # copying, induction and recall of pairs
    GREEDY = "greedy"  # how long both models write the same


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationOptions:
    """How a checkpoint is validated. The text limits count input tokens."""

    checks: frozenset[Check] = frozenset(Check)
    sequence_length: int = 512
    max_tokens: int = 32768
    max_tokens_per_kind: int = 10240  # so that the first kind of a file does not take everything
    batch_rows: int = 8  # sequences that run side by side
    consistency_tokens: int = 128  # of each of at most two sequences
    greedy_tokens: int = 64  # that both models write after each prompt
    dtype: str = "float32"  # of weights and activations, one of DTYPES
    device: str = "cpu"
    backend: str | None = None  # of kernels, one of BACKENDS; None takes Triton on a GPU
    numerics: Numerics = SERVED
    seed: int = 0  # of the random tokens that stand in for a text

    def __post_init__(self) -> None:
        """Refuse sizes and names that nothing can run with."""
        for name in (
            "sequence_length",
            "max_tokens",
            "max_tokens_per_kind",
            "batch_rows",
            "consistency_tokens",
            "greedy_tokens",
        ):
            if getattr(self, name) < 1:
                raise UsageError(
                    f"{name} is not valid", expected="at least 1", found=getattr(self, name)
                )
        names = {"dtype": (self.dtype, DTYPES), "backend": (self.backend, (None, *BACKENDS))}
        for name, (chosen, known) in names.items():
            if chosen not in known:
                raise UsageError(
                    f"{name} is not valid",
                    expected=" or ".join(filter(None, known)),
                    found=repr(chosen),
                )

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch's own."""
        found: object = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found
