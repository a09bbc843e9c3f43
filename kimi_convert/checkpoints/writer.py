"""Write one file of a plan, tensor by tensor, each from a stream of byte chunks.

What arrives is counted, written, and hashed on threads beside the one that writes: each byte once,
for its tensor or for the header. A file that does not follow its plan to the byte is never finished.
Names and renaming are not decided here: the path is a temporary one (see `output`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Self

from kimi_convert.checkpoints.background import BackgroundHashes, EarlySync, HashStream
from kimi_convert.checkpoints.clone import NO_EXTENTS, Cloner, Extent
from kimi_convert.checkpoints.disk import disk_errors, write_all
from kimi_convert.checkpoints.messages import quoted
from kimi_convert.checkpoints.shard_plan import PlannedShard, PlannedTensor
from kimi_convert.checkpoints.written import WrittenShard
from kimi_convert.errors import VerificationError

Chunk = bytes | bytearray | memoryview


class ShardWriter:
    """Writes the tensors of one planned file, in the order of the plan.

    A context manager that closes the file; only `finish` makes it count.
    """

    def __init__(
        self, path: Path, shard: PlannedShard, extents: Mapping[str, Extent] = NO_EXTENTS
    ) -> None:
        """Create the file, which must not exist, and write its header.

        Args:
            path: of the file.
            shard: what it will hold.
            extents: where tensors lie that are carried over: their blocks are shared where they can
                be, and what arrives of them is hashed as any other.
        """
        self.shard = shard
        self._cloner = Cloner(extents)
        self._path = path
        self._written_bytes = 0
        self._streams: dict[str, HashStream] = {}  # of the tensors written so far
        header = memoryview(shard.header())
        self._header_sha256 = hashlib.sha256(header).hexdigest()
        with self._disk_errors():
            self._file = path.open("xb", buffering=0)
        self._hashes = BackgroundHashes()
        self._sync = EarlySync(self._file.fileno())
        try:
            self._append(header, range(0))
        except BaseException:
            self._close()
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
        self._close()

    def write(self, name: str, chunks: Iterable[Chunk] | Chunk) -> None:
        """Write the next tensor of the plan.

        Args:
            name: the tensor, for a check that it is the next one.
            chunks: its bytes in order, little endian, row-major; or all of them at once. A chunk
                must stay as it is: it may be hashed while the next ones are made.

        Raises:
            VerificationError: not the next tensor, or not exactly the planned number of bytes.
            ResourceError: the disk does not take it.
        """
        tensor = self._begin(name)
        with self._disk_errors():
            there = self._cloner.clone(
                name, self._file.fileno(), self._written_bytes, tensor.nbytes
            )
        stream = self._hashes.begin(tensor.nbytes)
        arrived = 0
        for chunk in (chunks,) if isinstance(chunks, Chunk) else chunks:
            data = memoryview(chunk)
            arrived += data.nbytes
            if arrived > tensor.nbytes:
                break
            if data.nbytes:  # an empty view of several axes cannot be cast
                data = data.cast("B")
                self._hashes.submit(stream, data)
                self._append(data, there)
                del chunk, data  # only what is being hashed is held
                self._hashes.settle()
        self._end(tensor, arrived)
        self._streams[name] = stream

    def finish(self) -> WrittenShard:
        """Make the bytes durable and say what was written.

        Raises:
            VerificationError: the file is not as planned.
            ResourceError: the disk does not take it.
        """
        missing = len(self.shard.tensors) - len(self._streams)
        if missing or self._written_bytes != self.shard.file_bytes:
            raise VerificationError(
                f"file is not finished, {missing} tensors of its plan are missing",
                where=self.shard.file_name,
                expected=f"{self.shard.file_bytes} bytes",
                found=f"{self._written_bytes} bytes",
            )
        with self._disk_errors():
            self._sync.finish()
        self._hashes.settle(0)
        return WrittenShard(
            self.shard.file_name,
            self._written_bytes,
            self._header_sha256,
            {name: stream.digest.hexdigest() for name, stream in self._streams.items()},
        )

    @property
    def next_tensor(self) -> PlannedTensor | None:
        """The tensor that the plan wants next, or None after the last."""
        at = len(self._streams)
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

    def _end(self, tensor: PlannedTensor, arrived: int) -> None:
        if arrived != tensor.nbytes:
            raise VerificationError(
                f"tensor {quoted(tensor.name)} does not have the planned number of bytes",
                where=self.shard.file_name,
                expected=tensor.nbytes,
                found=f"{arrived} or more" if arrived > tensor.nbytes else arrived,
            )

    def _append(self, data: memoryview, there: range) -> None:
        """Write the bytes that come next, but for those that are there already."""
        at, end = self._written_bytes, self._written_bytes + data.nbytes
        with self._disk_errors():
            self._write_at(at, data[: max(0, min(there.start, end) - at)])
            rest = max(at, there.stop)
            self._write_at(rest, data[rest - at :])
            self._sync.wrote(data.nbytes)
        self._written_bytes = end

    def _write_at(self, at: int, data: memoryview) -> None:
        if data:
            os.lseek(self._file.fileno(), at, os.SEEK_SET)
            write_all(self._file.fileno(), data)

    def _close(self) -> None:
        self._hashes.close()
        self._sync.close()
        with self._disk_errors():
            self._file.close()

    def _disk_errors(self) -> AbstractContextManager[None]:
        left = self.shard.file_bytes - self._written_bytes
        return disk_errors(self._path, doing="write a file of weights", nbytes=left)
