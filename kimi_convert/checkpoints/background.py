"""Hash and sync beside the thread that reads and writes.

Both let go of Python's lock while they work. What is given to a hash must not change any more; how
much of it is held at once is bounded.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

_LANES = 2  # streams that are hashed at once: one hash takes longer than reading and writing
_HELD_BYTES = 32 * 1024 * 1024
_THREADED_BYTES = 64 * 1024  # below, handing over to a thread takes longer than hashing
_SYNC_BYTES = 64 * 1024 * 1024


class Sha256(Protocol):
    """What `hashlib.sha256` returns, which has no public name."""

    def update(self, data: memoryview, /) -> None: ...  # noqa: D102
    def hexdigest(self) -> str: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class HashStream:
    """The hash of one stream of bytes."""

    digest: Sha256
    lane: ThreadPoolExecutor | None  # None for a short one, which is hashed at once


class BackgroundHashes:
    """Takes the SHA-256 of one stream after the other; a stream keeps to one thread."""

    def __init__(self) -> None:
        self._lanes = tuple(ThreadPoolExecutor(1, "hash") for _ in range(_LANES))
        self._streams = 0
        self._pending: deque[tuple[Future[None], int]] = deque()
        self._pending_bytes = 0

    def begin(self, nbytes: int) -> HashStream:
        """Begin a stream of so many bytes."""
        if nbytes < _THREADED_BYTES:
            return HashStream(hashlib.sha256(), None)
        self._streams += 1
        return HashStream(hashlib.sha256(), self._lanes[self._streams % _LANES])

    def submit(self, stream: HashStream, data: memoryview) -> None:
        """Hash the next bytes of a stream, soon; they are held until then."""
        if stream.lane is None:
            stream.digest.update(data)
            return
        self._pending.append((stream.lane.submit(stream.digest.update, data), data.nbytes))
        self._pending_bytes += data.nbytes

    def settle(self, held_bytes: int = _HELD_BYTES) -> None:
        """Wait until no more bytes than these are held."""
        while self._pending_bytes > held_bytes:
            future, nbytes = self._pending.popleft()
            future.result()
            self._pending_bytes -= nbytes

    def close(self) -> None:
        """Wait for what is being hashed and end the threads."""
        for lane in self._lanes:
            lane.shutdown(cancel_futures=True)


class EarlySync:
    """Brings the bytes of a file to the disk while more are written, so that the end waits less.

    What is on the disk leaves the system's cache: the next bytes take its pages, and other files
    stay cached while a checkpoint that is larger than memory goes by. Pages that are used again are
    also faster: where a virtual machine gives free memory back to its host, writing to memory that
    was free takes three times the processor's time (0.3 and 0.9 s for a GB).
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._thread = ThreadPoolExecutor(1, "sync")
        self._pending: Future[None] | None = None
        self._written_bytes = 0
        self._begun_bytes = 0

    def wrote(self, nbytes: int) -> None:
        """Take note of bytes that were written at the end of the file.

        Raises:
            OSError: what was written before could not be brought to the disk.
        """
        self._written_bytes += nbytes
        waiting = self._written_bytes - self._begun_bytes
        if waiting >= _SYNC_BYTES and (self._pending is None or self._pending.done()):
            self._raise_error()
            self._pending = self._thread.submit(self._sync, self._begun_bytes, waiting)
            self._begun_bytes = self._written_bytes

    def finish(self) -> None:
        """Wait until all is on the disk.

        Raises:
            OSError: it is not. The system tells each error once, also that of an earlier sync.
        """
        self._raise_error()
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Wait for a sync that is under way and end the thread."""
        self._thread.shutdown()

    def _sync(self, start: int, nbytes: int) -> None:
        os.fsync(self._descriptor)
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # no more than a hint
                os.posix_fadvise(self._descriptor, start, nbytes, os.POSIX_FADV_DONTNEED)

    def _raise_error(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
