"""Read tensors of an indexed checkpoint: lazily mapped, by rows, or as raw bytes.

Two ways, for two needs. `tensor` and `rows` map the file (safetensors library): nothing is
copied, but pages once touched count as resident until `release`. `chunks` reads pieces of a few MB,
which are freed when their taker lets go of them, and needs no torch.

A reader belongs to one thread; open one for each.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol, cast

from safetensors import SafetensorError, safe_open

from kimi_convert.checkpoints.index import CheckpointIndex, ShardFile
from kimi_convert.checkpoints.messages import quoted
from kimi_convert.checkpoints.regular_file import CHUNK_BYTES, chunks_of, open_regular
from kimi_convert.checkpoints.releasing import Releasing
from kimi_convert.checkpoints.safetensors_header import TensorSpec
from kimi_convert.errors import CheckpointError

if TYPE_CHECKING:
    import torch


class _Slice(Protocol):
    """A tensor that is not read yet."""

    def __getitem__(self, rows: slice) -> torch.Tensor: ...


class _Handle(Protocol):
    """An open file of the safetensors library, which comes without types."""

    def get_tensor(self, name: str) -> torch.Tensor: ...
    def get_slice(self, name: str) -> _Slice: ...
    def __exit__(self, kind: object, error: object, trace: object) -> None: ...


class ShardProvider(Protocol):
    """Where the files of an index come from, if they do not all lie in its folder."""

    def provide(self, shard: str) -> ShardFile:
        """Return a file, fetched if need be, before it is read."""
        ...

    def release(self, shard: str) -> None:
        """Take note that nothing will read a file any more."""
        ...


class CheckpointReader(Releasing):
    """Reads the tensors of an index; a context manager that releases at the end."""

    def __init__(self, index: CheckpointIndex, provider: ShardProvider | None = None) -> None:
        """Open nothing yet.

        Args:
            index: what can be read.
            provider: where files come from; None for those that the index names.
        """
        self.index = index
        self._provider = provider
        self._handles: dict[str, _Handle] = {}

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor on the CPU whose pages are read when they are first touched.

        Raises:
            CheckpointError: there is no such tensor, or its file has changed.
        """
        spec = self.index.spec(name)
        try:
            return self._handle(spec).get_tensor(name)
        except SafetensorError as error:
            raise self._unreadable(spec, error) from error

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows start to stop - 1 of the first axis; the others are not touched.

        Raises:
            CheckpointError: there is no such tensor or no such rows, or its file has changed.
        """
        spec = self.index.spec(name)
        if not spec.shape or not 0 <= start <= stop <= spec.shape[0]:
            raise CheckpointError(
                f"tensor {quoted(name)} has no rows {start} to {stop}",
                where=spec.shard,
                found=f"shape {list(spec.shape)}",
            )
        try:
            return self._handle(spec).get_slice(name)[start:stop]
        except SafetensorError as error:
            raise self._unreadable(spec, error) from error

    def chunks(self, name: str, *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[memoryview]:
        """Give a tensor's bytes in order; each chunk is the taker's to keep.

        Raises:
            CheckpointError: there is no such tensor, or its file has changed.
        """
        spec = self.index.spec(name)
        file = self._file(spec.shard)
        with open_regular(file.path) as descriptor:
            for chunk in chunks_of(
                descriptor, spec.start, spec.end, path=file.path, chunk_bytes=chunk_bytes
            ):
                # After the read: what is handed out was read from the unchanged file.
                file.check_unchanged(os.fstat(descriptor))
                yield chunk

    def release(self) -> None:
        """Close every file. Its pages leave memory once no tensor of it is held any more."""
        handles, self._handles = self._handles, {}
        for handle in handles.values():
            handle.__exit__(None, None, None)

    def _handle(self, spec: TensorSpec) -> _Handle:
        file = self._file(spec.shard)
        handle = self._handles.get(spec.shard)
        if handle is None:
            file.check_unchanged()
            try:
                opened: object = safe_open(file.path, framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise self._unreadable(spec, error) from error
            handle = cast("_Handle", opened)
            self._handles[spec.shard] = handle
        # Also for a file just opened: it may have been replaced between the two steps.
        file.check_unchanged()
        return handle

    def _file(self, shard: str) -> ShardFile:
        return self._provider.provide(shard) if self._provider else self.index.shards[shard]

    def _unreadable(self, spec: TensorSpec, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"tensor {quoted(spec.name)} cannot be read",
            where=self.index.shards[spec.shard].path,
            found=error,
        )
