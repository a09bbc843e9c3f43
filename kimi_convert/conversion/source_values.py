"""Whether the values that a conversion reads are finite, as one quick pass over their bytes.

A fit of hours must not end at a NaN that a minute of reading would have found.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kimi_convert.checkpoints.finite import FLOATS, find_non_finite
from kimi_convert.checkpoints.weight_reader import WeightReader
from kimi_convert.checkpoints.weights import Weight
from kimi_convert.config.progress import ProgressCallback, ProgressEvent
from kimi_convert.conversion.plan import ConversionPlan
from kimi_convert.errors import CheckpointError

_STAGE = "checking values"


def check_source_values(plan: ConversionPlan, on_progress: ProgressCallback) -> None:
    """Read every source tensor that the plan reads, once.

    Raises:
        CheckpointError: one holds NaN or Inf; the message names it.
    """
    done, total = 0, plan.read_bytes
    with WeightReader(plan.index) as reader:
        for weight in plan.read_weights():
            on_progress(ProgressEvent(_STAGE, done, total, "bytes", weight.name))
            for _ in finite_chunks(reader, weight, plan.source):
                pass
            done += weight.stored_bytes
    on_progress(ProgressEvent(_STAGE, done, total, "bytes"))


def finite_chunks(reader: WeightReader, weight: Weight, source: Path) -> Iterator[memoryview]:
    """Give a weight's plain bytes, each chunk checked for NaN and Inf on its way.

    Raises:
        CheckpointError: it holds one; the message names it.
    """
    for chunk in reader.chunks(weight):
        if weight.dtype in FLOATS and find_non_finite(chunk, weight.dtype) is not None:
            raise not_finite_error(weight.name, source)
        yield chunk


def not_finite_error(name: str, source: Path) -> CheckpointError:
    """Return the error for a tensor of the source that holds NaN or Inf."""
    return CheckpointError(
        f"tensor {name!r} holds values that are not finite",
        where=source,
        expected="no NaN and no Inf",
        hint="`kimi-convert validate` finds every such tensor; download the checkpoint again.",
    )
