"""Residual streams [N, T, D] that pass through the layers, a few sequences at a time.

A stream lives in memory while it is small and in a file of its own when it is not; either way it
is one tensor, changed in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import torch

from kimi_convert.errors import ResourceError
from kimi_convert.model.block import DecoderLayer

_ROWS = 8  # sequences in one call
_GROUPS = 10
IN_MEMORY_BYTES = 2 * 1024**3


def make_stream(
    tokens: torch.Tensor, embed: Callable[[torch.Tensor], torch.Tensor], *, spill: Path | None
) -> torch.Tensor:
    """Return the embedded tokens [N, T, D] fp32.

    Args:
        tokens: [N, T] int64.
        embed: the model's embedding.
        spill: folder for a stream that is too large for memory; None to keep it there anyway.

    Raises:
        ResourceError: the file cannot be made.
    """
    first = embed(tokens[:1])
    shape = (*tokens.shape, first.shape[-1])
    nbytes = 4 * tokens.numel() * first.shape[-1]
    stream = (
        torch.empty(shape, device=first.device)
        if spill is None or nbytes <= IN_MEMORY_BYTES
        else _in_file(spill, shape)
    )
    for rows in batches(len(tokens)):
        stream[rows] = embed(tokens[rows]).float().to(stream.device)
    return stream


def copy_stream(stream: torch.Tensor, *, spill: Path) -> torch.Tensor:
    """Return a copy that can be changed, in memory or in a file as `make_stream`'s.

    Raises:
        ResourceError: the file cannot be made.
    """
    if 4 * stream.numel() <= IN_MEMORY_BYTES:
        return stream.clone()
    copied = _in_file(spill, tuple(stream.shape))
    for rows in batches(len(stream)):
        copied[rows] = stream[rows]
    return copied


def batches(num_rows: int) -> Iterator[slice]:
    """Yield runs of rows that go through a layer together."""
    for start in range(0, num_rows, _ROWS):
        yield slice(start, min(start + _ROWS, num_rows))


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
    after = stream[rows].to(mixed.device) + mixed
    stream[rows] = (after + layer.feed_forward(after)).to(stream.device)


def _in_file(folder: Path, shape: tuple[int, ...]) -> torch.Tensor:
    size = 1
    for extent in shape:
        size *= extent
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
