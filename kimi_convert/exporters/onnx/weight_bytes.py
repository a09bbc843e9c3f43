"""Bytes of weights as a graph stores them, made from a checkpoint's while they stream past.

Values that the new dtype cannot hold are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from kimi_convert.checkpoints.dtypes import DTYPES, torch_dtype
from kimi_convert.checkpoints.messages import quoted
from kimi_convert.checkpoints.reader import CheckpointReader
from kimi_convert.checkpoints.safetensors_header import TensorSpec
from kimi_convert.errors import CheckpointError
from kimi_convert.exporters.onnx.quantization import Quantized, quantize

_ROWS_BYTES = 1 << 24  # of fp32 weights that are quantised at a time


def interleaved_rows(
    reader: CheckpointReader, one: TensorSpec, other: TensorSpec, dtype: str
) -> Iterator[memoryview]:
    """Give two matrices row by row in turn."""
    whole = [
        np.frombuffer(b"".join(converted(reader, spec, dtype)), dtype=np.uint8).reshape(
            spec.shape[0], -1
        )
        for spec in (one, other)
    ]
    yield memoryview(np.stack(whole, axis=1).reshape(-1).data)


def quantized_rows(
    reader: CheckpointReader, specs: Sequence[TensorSpec], bits: int
) -> Iterator[Quantized]:
    """Give matrices of one shape as integers, a part of the rows at a time.

    Args:
        reader: of the checkpoint.
        specs: the matrices; of several, rows take turns.
        bits: 4 or 8.
    """
    width = specs[0].shape[1]
    step = max(1, _ROWS_BYTES // (4 * width * len(specs)))
    parts = [_wide_rows(reader, spec, step) for spec in specs]
    for rows in zip(*parts, strict=True):
        yield quantize(np.stack(rows, axis=1).reshape(-1, width), bits)


def _wide_rows(reader: CheckpointReader, spec: TensorSpec, step: int) -> Iterator[np.ndarray]:
    """Give so many rows at a time in fp32; read, not mapped, so that no page stays resident."""
    import torch

    width = spec.shape[1]
    row_bytes = width * DTYPES[spec.dtype].width_bytes
    for chunk in reader.chunks(spec.name, chunk_bytes=step * row_bytes):
        values = torch.frombuffer(chunk, dtype=torch_dtype(spec.dtype)).float().numpy()
        if not np.isfinite([values.min(), values.max()]).all():
            raise _not_finite(reader, spec, "an integer")
        yield values.reshape(-1, width)


def converted(reader: CheckpointReader, spec: TensorSpec, dtype: str) -> Iterator[memoryview]:
    """Give a tensor's bytes in another dtype; refuse values that are not finite there."""
    import torch

    from kimi_convert.checkpoints.tensor_bytes import tensor_bytes

    source, target = torch_dtype(spec.dtype), torch_dtype(dtype)
    for chunk in reader.chunks(spec.name):
        values = torch.frombuffer(chunk, dtype=source).to(target)
        low, high = values.aminmax()
        if not (low.isfinite() and high.isfinite()):
            raise _not_finite(reader, spec, dtype)
        yield chunk if source is target else tensor_bytes(values)


def _not_finite(reader: CheckpointReader, spec: TensorSpec, dtype: str) -> CheckpointError:
    return CheckpointError(
        f"tensor {quoted(spec.name)} holds values that {dtype} cannot hold",
        where=reader.index.shards[spec.shard].path,
        found="NaN, Inf or a value too large",
        hint="Export with --precision fp32; if that fails too, the checkpoint is damaged.",
    )
