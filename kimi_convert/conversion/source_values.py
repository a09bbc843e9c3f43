"""Whether the values that a conversion reads are finite, as one quick pass over their bytes.

A fit of hours must not end at a NaN that a minute of reading would have found.
"""

from __future__ import annotations

from pathlib import Path

from kimi_convert.checkpoints.finite import FLOATS, find_non_finite
from kimi_convert.checkpoints.reader import CheckpointReader
from kimi_convert.config.progress import ProgressCallback, ProgressEvent
from kimi_convert.conversion.plan import ConversionPlan
from kimi_convert.errors import CheckpointError

_STAGE = "checking values"


def check_source_values(plan: ConversionPlan, on_progress: ProgressCallback) -> None:
    """Read every source tensor that the plan reads, once.

    Raises:
        CheckpointError: one holds NaN or Inf; the message names it.
    """
    read = {name for task in plan.tasks for name in task.sources}
    done, total = 0, plan.read_bytes
    with CheckpointReader(plan.index) as reader:
        for spec in plan.index.tensors.values():  # in the order of the files
            if spec.name not in read:
                continue
            on_progress(ProgressEvent(_STAGE, done, total, "bytes", spec.name))
            for chunk in reader.chunks(spec.name):
                if spec.dtype in FLOATS and find_non_finite(chunk, spec.dtype) is not None:
                    raise not_finite_error(spec.name, plan.source)
            done += spec.nbytes
    on_progress(ProgressEvent(_STAGE, done, total, "bytes"))


def not_finite_error(name: str, source: Path) -> CheckpointError:
    """Return the error for a tensor of the source that holds NaN or Inf."""
    return CheckpointError(
        f"tensor {name!r} holds values that are not finite",
        where=source,
        expected="no NaN and no Inf",
        hint="`kimi-convert validate` finds every such tensor; download the checkpoint again.",
    )
