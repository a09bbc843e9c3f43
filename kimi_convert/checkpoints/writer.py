"""Write one file of a plan, tensor by tensor, each from a stream of byte chunks.

Nothing is held but the current chunk. What arrives is counted and hashed on its way, on two threads
beside the one that writes; a file that does not follow its plan to the byte is never finished. Names
and renaming are not decided here: the path is a temporary one (see `output`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from kimi_convert.checkpoints.disk import disk_errors, write_all
from kimi_convert.checkpoints.file_copies import FileCopies
from kimi_convert.checkpoints.messages import quoted
from kimi_convert.checkpoints.reader import Extent
from kimi_convert.checkpoints.shard_plan import PlannedShard, PlannedTensor
from kimi_convert.errors import VerificationError

Chunk = bytes | bytearray | memoryview

# Of the file and of the tensor: each takes longer than reading, and neither gives the other.
_HASHES = 2
_THREADED_BYTES = 256 * 1024  # below, handing over to a thread takes longer than hashing


class Sha256(Protocol):
    """What `hashlib.sha256` returns, which has no public name."""

    def update(self, data: memoryview, /) -> None: ...  # noqa: D102
    def hexdigest(self) -> str: ...  # noqa: D102


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
        self._copies = FileCopies()
        self._hashers = ThreadPoolExecutor(_HASHES, "hash")
        with self._disk_errors():
            self._file = path.open("x+b", buffering=0)
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
        self._hashers.shutdown()
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
        tensor = self._begin(name)
        digest = hashlib.sha256()
        arrived = 0
        for chunk in (chunks,) if isinstance(chunks, Chunk) else chunks:
            data = memoryview(chunk)
            arrived += data.nbytes
            if arrived > tensor.nbytes:
                break
            if data.nbytes:  # an empty view of several axes cannot be cast
                self._append(data.cast("B"), digest)
        return self._end(tensor, arrived, digest)

    def copy(
        self, name: str, extents: Iterable[Extent], *, look: Callable[[memoryview], None]
    ) -> str:
        """Let the file system copy the next tensor of the plan; return the SHA-256 of its bytes.

        Args:
            name: the tensor, for a check that it is the next one.
            extents: where its bytes lie, in order.
            look: given the bytes that have arrived, to refuse them with an exception.

        Raises:
            CheckpointError: the source ends early.
            VerificationError: not the next tensor, or not exactly the planned number of bytes.
            ResourceError: the disk does not take it.
        """
        tensor = self._begin(name)
        digest = hashlib.sha256()
        arrived = 0
        for extent in extents:
            arrived += extent.nbytes
            if arrived > tensor.nbytes:
                break
            with self._disk_errors():
                data = self._copies.copy(extent, self._file.fileno(), self._written_bytes)
            self._count(data, digest, look)
        return self._end(tensor, arrived, digest)

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

    def _begin(self, name: str) -> PlannedTensor:
        tensor = self.next_tensor
        if tensor is None or tensor.name != name:
            raise VerificationError(
                "tensors are not written in the order of the plan",
                where=self.shard.file_name,
                expected=quoted(tensor.name) if tensor else "no further tensor",
                found=quoted(name),
            )
        return tensor

    def _end(self, tensor: PlannedTensor, arrived: int, digest: Sha256) -> str:
        if arrived != tensor.nbytes:
            raise VerificationError(
                f"tensor {quoted(tensor.name)} does not have the planned number of bytes",
                where=self.shard.file_name,
                expected=tensor.nbytes,
                found=f"{arrived} or more" if arrived > tensor.nbytes else arrived,
            )
        self._tensor_hashes[tensor.name] = digest.hexdigest()
        return self._tensor_hashes[tensor.name]

    def _append(self, data: memoryview, digest: Sha256 | None = None) -> None:
        def write(view: memoryview) -> None:
            with self._disk_errors():
                write_all(self._file.fileno(), view)

        self._count(data, digest, write)

    def _count(
        self, data: memoryview, digest: Sha256 | None, meanwhile: Callable[[memoryview], None]
    ) -> None:
        """Hash bytes for the file and for their tensor while something else is done with them."""
        hashes = [self._file_hash] if digest is None else [self._file_hash, digest]
        if len(data) < _THREADED_BYTES:
            for one in hashes:
                one.update(data)
            meanwhile(data)
        else:
            pending = [self._hashers.submit(one.update, data) for one in hashes]
            try:
                meanwhile(data)
            finally:
                for one in pending:
                    one.result()
        self._written_bytes += len(data)

    def _disk_errors(self) -> AbstractContextManager[None]:
        left = self.shard.file_bytes - self._written_bytes
        return disk_errors(self._path, doing="write a file of weights", nbytes=left)
