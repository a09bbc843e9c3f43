"""Read weights, quantised or plain, as plain values: whole, or in chunks of bounded size.

Whatever goes wrong with the parts of a quantised weight shows here: scales that are not finite,
a stored shape that contradicts its values. Imports torch where something is decoded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kimi_convert.checkpoints.dtypes import torch_dtype
from kimi_convert.checkpoints.index import CheckpointIndex
from kimi_convert.checkpoints.messages import quoted
from kimi_convert.checkpoints.reader import CheckpointReader, ShardProvider
from kimi_convert.checkpoints.regular_file import CHUNK_BYTES
from kimi_convert.checkpoints.releasing import Releasing
from kimi_convert.checkpoints.safetensors_header import TensorSpec
from kimi_convert.checkpoints.weights import Weight
from kimi_convert.config.quantization import FP8_TILE
from kimi_convert.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_FP32_BYTES = 4


class WeightReader(Releasing):
    """Reads the weights of one checkpoint; a context manager that releases at the end."""

    def __init__(self, index: CheckpointIndex, provider: ShardProvider | None = None) -> None:
        """Open nothing yet; arguments as of `CheckpointReader`."""
        self._reader = CheckpointReader(index, provider)
        self.index = index

    def tensor(self, weight: Weight) -> torch.Tensor:
        """Return a weight on the CPU: mapped where it is plain, decoded where it is not.

        Raises:
            CheckpointError: a file has changed, or parts of the weight are not valid.
        """
        if weight.quantization is None:
            return self._reader.tensor(weight.stored[0].name)
        import torch

        values = torch.empty(weight.shape, dtype=torch_dtype(weight.dtype))
        first = 0
        for rows in self.rows(weight):
            values[first : first + len(rows)] = rows
            first += len(rows)
        return values

    def wide(self, weight: Weight) -> torch.Tensor:
        """Return a weight in fp32 on the CPU; unlike `tensor`, it holds no file and no copy.

        Raises:
            CheckpointError: a file has changed, or parts of the weight are not valid.
        """
        import torch

        wide = torch.empty(weight.shape, dtype=torch.float32)
        flat, done = wide.view(-1), 0
        for chunk in self.chunks(weight):
            part = torch.frombuffer(chunk, dtype=torch_dtype(weight.dtype))
            flat[done : done + len(part)] = part
            done += len(part)
        return wide

    def chunks(self, weight: Weight) -> Iterator[memoryview]:
        """Give a weight's plain bytes in order, each chunk the taker's to keep.

        Raises:
            CheckpointError: a file has changed, or parts of the weight are not valid.
        """
        if weight.quantization is None:
            yield from self._reader.chunks(weight.stored[0].name)
            return
        from kimi_convert.checkpoints.tensor_bytes import tensor_bytes

        for rows in self.rows(weight):
            yield tensor_bytes(rows)

    def stored_chunks(self, stored: TensorSpec) -> Iterator[memoryview]:
        """Give a stored tensor's bytes as they are; see `CheckpointReader.chunks`."""
        return self._reader.chunks(stored.name)

    def rows(self, weight: Weight, *, multiple: int = 1) -> Iterator[torch.Tensor]:
        """Give a matrix's plain rows in order, each part the taker's to keep.

        Args:
            weight: a matrix.
            multiple: of which every part but the last has a number of rows.

        Raises:
            CheckpointError: a file has changed, or parts of the weight are not valid.
        """
        import torch

        if weight.quantization is not None:
            yield from self._decoded(weight, multiple)
            return
        stored = weight.stored[0]
        dtype = torch_dtype(stored.dtype)
        row_bytes = max(1, stored.nbytes // max(weight.shape[0], 1))
        at_once = multiple * max(1, CHUNK_BYTES // (multiple * row_bytes))
        for chunk in self._reader.chunks(stored.name, chunk_bytes=at_once * row_bytes):
            yield torch.frombuffer(chunk, dtype=dtype).view(-1, weight.shape[1])

    def release(self) -> None:
        """Close every file. Its pages leave memory once no tensor of it is held any more."""
        self._reader.release()

    def _decoded(self, weight: Weight, multiple: int) -> Iterator[torch.Tensor]:
        """Give whole tiles of decoded rows."""
        import torch

        from kimi_convert.checkpoints.decoding import decode

        tile = weight.quantization
        assert tile is not None
        values = weight.stored[0]
        scales = self._scales(weight)
        self._check_shape(weight)
        row_bytes = values.nbytes // max(weight.shape[0], 1)
        whole = math.lcm(tile.tile_rows, multiple)
        rows = whole * max(1, tile_chunk_bytes(weight) // (whole * row_bytes))
        stored, wanted = torch_dtype(values.dtype), torch_dtype(weight.dtype)
        first = 0
        for chunk in self._reader.chunks(values.name, chunk_bytes=rows * row_bytes):
            part = torch.frombuffer(chunk, dtype=stored).view(-1, values.shape[1])
            tiles = scales[first : first + -(-len(part) // tile.tile_rows)]
            first += len(tiles)
            yield decode(part, tiles, tile, wanted)

    def _scales(self, weight: Weight) -> torch.Tensor:
        """Read and check the scales: one of them spoils a whole tile."""
        from kimi_convert.checkpoints.decoding import scale_values

        assert weight.quantization is not None
        spec = weight.stored[1]
        scales = self._whole(spec)
        if not bool(scale_values(scales, weight.quantization.encoding).isfinite().all()):
            raise CheckpointError(
                f"scales {quoted(spec.name)} of a quantised weight are not finite",
                where=self.index.folder,
                expected="no NaN and no Inf",
                hint="Download the checkpoint again.",
            )
        return scales

    def _check_shape(self, weight: Weight) -> None:
        for spec in weight.stored[2:]:
            rows, columns = self._whole(spec)
            stated = (int(rows), int(columns))
            if stated != weight.shape:
                raise CheckpointError(
                    f"{quoted(spec.name)} contradicts the values that it describes",
                    where=self.index.folder,
                    expected=list(weight.shape),
                    found=list(stated),
                    hint="The checkpoint is damaged, or was written by a faulty program.",
                )

    def _whole(self, spec: TensorSpec) -> torch.Tensor:
        import torch

        data = bytearray()
        for chunk in self._reader.chunks(spec.name):
            data += chunk
        dtype = torch_dtype(spec.dtype)
        if not data:  # no buffer may be empty
            return torch.empty(spec.shape, dtype=dtype)
        return torch.frombuffer(data, dtype=dtype).view(spec.shape)


def tile_chunk_bytes(weight: Weight) -> int:
    """Return how many stored bytes of a weight are decoded at once, about."""
    values = weight.stored[0]
    decoded = weight.shape[0] * weight.shape[1] * _FP32_BYTES
    return max(1, CHUNK_BYTES * values.nbytes // max(decoded, 1))


def decoding_bytes(weight: Weight) -> int:
    """Return the bytes in memory while a weight is read and decoded, at most: one chunk.

    Stored rows, their fp32 copies and bits, the result and its pieces; and all scales twice.
    """
    tile = weight.quantization
    if tile is None:
        return min(CHUNK_BYTES, weight.stored_bytes)
    rows = max(1, weight.shape[0])
    row_bytes = max(1, weight.stored[0].nbytes // rows)
    at_once = tile.tile_rows * max(1, tile_chunk_bytes(weight) // (tile.tile_rows * row_bytes))
    values = min(at_once, rows) * weight.shape[1]
    scales = 2 * _FP32_BYTES * weight.stored[1].nbytes
    return min(at_once, rows) * row_bytes + values * 3 * _FP32_BYTES + scales


def quantizing_bytes(weight: Weight) -> int:
    """Return the bytes in memory while a weight becomes FP8 blocks, at most.

    Rows as they are read, and two fp32 copies and the result of them.
    """
    row_bytes = max(1, weight.shape[1]) * _FP32_BYTES
    rows = min(FP8_TILE * max(1, CHUNK_BYTES // (FP8_TILE * 2)), weight.shape[0] + FP8_TILE)
    at_once = min(rows, FP8_TILE * max(1, CHUNK_BYTES // (FP8_TILE * row_bytes // 2)))
    return decoding_bytes(weight) + 4 * max(at_once, FP8_TILE) * row_bytes
