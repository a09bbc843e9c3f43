"""Write one file of a plan, tensor by tensor, each from a stream of byte chunks.

Nothing is held but the current chunk. What arrives is counted and hashed on its way; a file
that does not follow its plan to the byte is never finished. Names and renaming are not decided
here: the path is a temporary one (see `output`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from kimi_convert.checkpoints.disk import disk_errors, write_all
from kimi_convert.checkpoints.messages import quoted
from kimi_convert.checkpoints.shard_plan import PlannedShard, PlannedTensor
from kimi_convert.errors import VerificationError

Chunk = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """One finished file of an output."""

    name: str
    nbytes: int
    sha256: str  # hex
    tensor_sha256: Mapping[str, str] = field(default_factory=dict[str, str])  # name -> hex


class ShardWriter:
    """Writes the tensors of one planned file, in the order of the plan.

    A context manager that closes the file; only `finish` makes it count.
    """

    def __init__(self, path: Path, shard: PlannedShard) -> None:
        """Create the file, which must not exist, and write its header."""
        self.shard = shard
        self._path = path
        self._written_bytes = 0
        self._file_hash = hashlib.sha256()
        self._tensor_hashes: dict[str, str] = {}
        with self._disk_errors():
            self._file = path.open("xb", buffering=0)
        try:
            self._append(memoryview(shard.header()))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file; a network file system may only now say that it is full."""
        with self._disk_errors():
            self._file.close()

    def write(self, name: str, chunks: Iterable[Chunk] | Chunk) -> str:
        """Write the next tensor of the plan and return the SHA-256 of its bytes in hex.

        Args:
            name: the tensor, for a check that it is the next one.
            chunks: its bytes in order, little endian, row-major; or all of them at once.

        Raises:
            VerificationError: not the next tensor, or not exactly the planned number of bytes.
            ResourceError: the disk does not take it.
        """
        tensor = self.next_tensor
        if tensor is None or tensor.name != name:
            raise VerificationError(
                "tensors are not written in the order of the plan",
                where=self.shard.file_name,
                expected=quoted(tensor.name) if tensor else "no further tensor",
                found=quoted(name),
            )
        digest = hashlib.sha256()
        arrived = 0
        for chunk in (chunks,) if isinstance(chunks, Chunk) else chunks:
            data = memoryview(chunk)
            arrived += data.nbytes
            if arrived > tensor.nbytes:
                break
            if data.nbytes:  # an empty view of several axes cannot be cast
                data = data.cast("B")
                digest.update(data)
                self._append(data)
        if arrived != tensor.nbytes:
            raise VerificationError(
                f"tensor {quoted(name)} does not have the planned number of bytes",
                where=self.shard.file_name,
                expected=tensor.nbytes,
                found=f"{arrived} or more" if arrived > tensor.nbytes else arrived,
            )
        self._tensor_hashes[name] = digest.hexdigest()
        return self._tensor_hashes[name]

    def finish(self) -> WrittenFile:
        """Make the bytes durable and say what was written.

        Raises:
            VerificationError: the file is not as planned.
            ResourceError: the disk does not take it.
        """
        missing = len(self.shard.tensors) - len(self._tensor_hashes)
        if missing or self._written_bytes != self.shard.file_bytes:
            raise VerificationError(
                f"file is not finished, {missing} tensors of its plan are missing",
                where=self.shard.file_name,
                expected=f"{self.shard.file_bytes} bytes",
                found=f"{self._written_bytes} bytes",
            )
        with self._disk_errors():
            os.fsync(self._file.fileno())
        return WrittenFile(
            self.shard.file_name,
            self._written_bytes,
            self._file_hash.hexdigest(),
            dict(self._tensor_hashes),
        )

    @property
    def next_tensor(self) -> PlannedTensor | None:
        """The tensor that the plan wants next, or None after the last."""
        at = len(self._tensor_hashes)
        return self.shard.tensors[at] if at < len(self.shard.tensors) else None

    def _append(self, data: memoryview) -> None:
        with self._disk_errors():
            write_all(self._file.fileno(), data)
        self._file_hash.update(data)
        self._written_bytes += len(data)

    def _disk_errors(self) -> AbstractContextManager[None]:
        left = self.shard.file_bytes - self._written_bytes
        return disk_errors(self._path, doing="write a file of weights", nbytes=left)
