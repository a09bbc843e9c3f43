"""Residual streams [N, T, D] that pass through the layers, a few sequences at a time.

On a CPU a stream lives in memory while it is small and in a file of its own when it is not; on a GPU
it stays there. Either way it is one tensor, changed in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from kimi_convert.errors import ResourceError
from kimi_convert.model.block import DecoderLayer

_ROWS = 8  # sequences in one call
_GROUPS = 10
_MOST_VALUES = 2**25  # at a time
IN_MEMORY_BYTES = 2 * 1024**3


def make_stream(tokens: torch.Tensor, embed: nn.Embedding, *, spill: Path | None) -> torch.Tensor:
    """Return the embedded tokens [N, T, D] fp32.

    Args:
        tokens: [N, T] int64, on any device.
        embed: the model's embedding; the stream is where it is.
        spill: folder for a stream that is too large for memory; None to keep it there anyway.

    Raises:
        ResourceError: the file cannot be made.
    """
    device = embed.weight.device
    stream = _space((*tokens.shape, embed.embedding_dim), device, spill)
    for rows in batches(len(tokens)):
        stream[rows] = embed(tokens[rows].to(device)).float()
    return stream


def copy_stream(stream: torch.Tensor, *, spill: Path) -> torch.Tensor:
    """Return a copy that can be changed, in memory or in a file as `make_stream`'s.

    Raises:
        ResourceError: the file cannot be made.
    """
    copied = _space(tuple(stream.shape), stream.device, spill)
    for rows in batches(len(stream)):
        copied[rows] = stream[rows]
    return copied


def stays_in_memory(nbytes: int, device: torch.device) -> bool:
    """Say whether a stream of a size is held in the memory of a device, or in a file."""
    return device.type != "cpu" or nbytes <= IN_MEMORY_BYTES


def batches(num_rows: int, *, values_per_row: int = 1) -> Iterator[slice]:
    """Yield runs of rows that go through a layer together.

    Args:
        num_rows: of all.
        values_per_row: of what is made of a row; fewer rows go together where that is much, as the
            logits of a large vocabulary are.
    """
    size = rows_together(values_per_row)
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def rows_together(values_per_row: int) -> int:
    """Return how many rows go through a layer together; see `batches`."""
    return max(1, min(_ROWS, _MOST_VALUES // values_per_row))


def groups(num_rows: int) -> list[slice]:
    """Cut rows into groups that are summed up apart, so that some can choose a penalty."""
    count = min(_GROUPS, num_rows)
    edges = [round(num_rows * n / count) for n in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


def advance(stream: torch.Tensor, layer: DecoderLayer, mixed: torch.Tensor, rows: slice) -> None:
    """Take some rows through a layer, in place.

    Args:
        stream: before the layer.
        layer: gives the feed-forward.
        mixed: [n, T, D], the mixer's output for those rows.
        rows: which.
    """
    after = stream[rows] + mixed
    stream[rows] = after + layer.feed_forward(after)


def _space(shape: tuple[int, ...], device: torch.device, spill: Path | None) -> torch.Tensor:
    if spill is None or stays_in_memory(4 * math.prod(shape), device):
        return torch.empty(shape, device=device)
    return _in_file(spill, shape)


def _in_file(folder: Path, shape: tuple[int, ...]) -> torch.Tensor:
    size = math.prod(shape)
    number = sum(1 for _ in folder.glob("*.stream"))
    path = folder / f"{number}.stream"
    try:
        flat = torch.from_file(str(path), shared=True, size=size, dtype=torch.float32)
    except (OSError, RuntimeError) as error:
        raise ResourceError(
            "activations do not fit on the disk",
            where=path,
            expected=f"{4 * size} bytes",
            hint="Free space, or lower `calibration.tokens` in the recipe.",
        ) from error
    return flat.view(shape)
