"""Which tensors go into which file of a new checkpoint, to the byte, before any byte is written.

Pure: no file is touched. The order of the tensors is kept; a new file begins when the next
tensor would not fit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from kimi_convert.checkpoints.dtypes import DTYPES
from kimi_convert.checkpoints.messages import quoted
from kimi_convert.checkpoints.safetensors_header import (
    MAX_HEADER_BYTES,
    check_tensor_name,
    encode_entry,
    encode_header,
    padded_header_bytes,
)
from kimi_convert.errors import CheckpointError

# Loaders of transformers refuse a file that does not say this.
HEADER_METADATA: Mapping[str, str] = MappingProxyType({"format": "pt"})
_METADATA_BYTES = len('"__metadata__":{"format":"pt"}')


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor to be written."""

    name: str
    dtype: str  # safetensors name, a key of DTYPES
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        """Refuse what a reader would refuse."""
        check_tensor_name(self.name, where="the plan")
        if self.dtype not in DTYPES or any(size < 0 for size in self.shape):
            raise CheckpointError(
                f"tensor {quoted(self.name)} cannot be written",
                expected=f"a shape and one of the dtypes {', '.join(DTYPES)}",
                found=f"{quoted(self.dtype)} {list(self.shape)}",
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].width_bytes


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """One file to be written."""

    file_name: str
    tensors: tuple[PlannedTensor, ...]
    header_bytes: int  # with the 8 bytes of its length and the padding
    data_bytes: int

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return self.header_bytes + self.data_bytes

    def header(self) -> bytes:
        """Return the `header_bytes` bytes that the file starts with."""
        entries = _entries(self.tensors)
        return encode_header(entries, metadata=HEADER_METADATA, nbytes=self.header_bytes)

    def in_order(self, tensors: tuple[PlannedTensor, ...]) -> PlannedShard:
        """Return a file of the same tensors in another order, its header as short as it can be."""
        header = encode_header(_entries(tensors), metadata=HEADER_METADATA)
        return replace(self, tensors=tensors, header_bytes=len(header))


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """Every file of weights of a new checkpoint."""

    shards: tuple[PlannedShard, ...]

    @property
    def total_size(self) -> int:
        """Bytes of all tensors, as the index states it."""
        return sum(shard.data_bytes for shard in self.shards)

    @property
    def file_bytes(self) -> int:
        """Bytes of all files of weights; the index comes on top."""
        return sum(shard.file_bytes for shard in self.shards)

    def index_json(self) -> bytes:
        """Return the text of `model.safetensors.index.json`, sorted by tensor name."""
        weight_map = {
            tensor.name: shard.file_name for shard in self.shards for tensor in shard.tensors
        }
        index = {"metadata": {"total_size": self.total_size}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False)
        return text.encode("utf-8") + b"\n"


def plan_shards(tensors: Iterable[PlannedTensor], max_shard_bytes: int) -> ShardPlan:
    """Put tensors into files of at most `max_shard_bytes` bytes each, headers included.

    A tensor that does not fit with its header gets a file of its own. A file also ends where
    the next tensor would lie unaligned, which older readers cannot load and the format cannot
    pad; that takes an odd number of narrow elements before a wider dtype.

    Raises:
        CheckpointError: no tensors, or two of the same name.
    """
    groups: list[_Group] = []
    names: set[str] = set()
    for tensor in tensors:
        if tensor.name in names:
            raise CheckpointError(f"tensor {quoted(tensor.name)} is planned twice")
        names.add(tensor.name)
        if not groups or not groups[-1].takes(tensor, max_shard_bytes):
            groups.append(_Group())
        groups[-1].add(tensor)
    if not groups:
        raise CheckpointError("there are no tensors to write")
    return ShardPlan(
        tuple(
            group.shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors")
            for number, group in enumerate(groups, start=1)
        )
    )


class _Group:
    """The tensors of one file while it is being filled."""

    def __init__(self) -> None:
        self._tensors: list[PlannedTensor] = []
        self._entries_bytes = _METADATA_BYTES
        self._data_bytes = 0

    def takes(self, tensor: PlannedTensor, max_shard_bytes: int) -> bool:
        header_bytes = padded_header_bytes(self._entries_bytes + self._entry_bytes(tensor))
        return (
            header_bytes + self._data_bytes + tensor.nbytes <= max_shard_bytes
            and header_bytes <= MAX_HEADER_BYTES
            and self._data_bytes % DTYPES[tensor.dtype].width_bytes == 0
        )

    def add(self, tensor: PlannedTensor) -> None:
        self._entries_bytes += self._entry_bytes(tensor)
        self._tensors.append(tensor)
        self._data_bytes += tensor.nbytes

    def shard(self, file_name: str) -> PlannedShard:
        return PlannedShard(
            file_name,
            tuple(self._tensors),
            padded_header_bytes(self._entries_bytes),
            self._data_bytes,
        )

    def _entry_bytes(self, tensor: PlannedTensor) -> int:
        """Bytes of an entry at the end of the file, with the comma before it."""
        return len(_entry(tensor, self._data_bytes)) + 1


def _entry(tensor: PlannedTensor, start: int) -> bytes:
    return encode_entry(
        tensor.name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        start=start,
        end=start + tensor.nbytes,
    )


def _entries(tensors: Iterable[PlannedTensor]) -> Iterable[bytes]:
    start = 0
    for tensor in tensors:
        yield _entry(tensor, start)
        start += tensor.nbytes
