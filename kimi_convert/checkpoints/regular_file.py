"""Open and read a file that must be a plain file: never a pipe, a device or a folder.

Reads are positional and exact: a short read is an error, not a short answer.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

from kimi_convert.errors import CheckpointError

# What is read at once. Reading and writing a GB through pieces of 1, 2, 4 and 8 MB takes 0.26, 0.25,
# 0.27 and 0.29 s of processor; each piece also costs some 0.1 ms of Python.
CHUNK_BYTES = 4 * 1024 * 1024


@contextmanager
def open_regular(path: Path) -> Generator[int]:
    """Open a plain file for reading and give its descriptor; closed at the end.

    Links are followed: in the cache of the Hub every file is a link to ../../blobs/<hash>.

    Raises:
        CheckpointError: missing, not a plain file, or not readable.
    """
    try:
        # Without O_NONBLOCK the open of a named pipe would wait for a writer for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise CheckpointError("file is missing", where=path) from error
    except OSError as error:
        raise CheckpointError("file cannot be opened", where=path, found=error.strerror) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise CheckpointError(
                "not a plain file", where=path, found="a folder, pipe, socket or device"
            )
        yield descriptor
    finally:
        os.close(descriptor)


def read_into(descriptor: int, view: memoryview, *, offset: int, path: Path) -> None:
    """Fill `view` with the bytes from `offset` on.

    Raises:
        CheckpointError: the file ends before the view is full, or cannot be read.
    """
    done = 0
    while done < len(view):
        try:
            got = os.preadv(descriptor, [view[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(
                "file cannot be read", where=path, found=error.strerror
            ) from error
        if got == 0:
            raise CheckpointError(
                "file ends early",
                where=path,
                expected=f"at least {offset + len(view)} bytes",
                found=f"{offset + done} bytes",
                hint="The file is cut off; download it again.",
            )
        done += got


def chunks_of(
    descriptor: int, start: int, end: int, *, path: Path, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[memoryview]:
    """Give the bytes from `start` to `end` in order; each chunk is the taker's to keep.

    Memory that is new each time costs no more than one buffer that is filled again: numpy asks
    for large pages, and the allocator hands out what was given back.

    Raises:
        CheckpointError: the file ends before, or cannot be read.
    """
    import numpy as np  # commands that read no weights start faster without it

    for at in range(start, end, chunk_bytes):
        view = np.empty(min(chunk_bytes, end - at), np.uint8).data
        read_into(descriptor, view, offset=at, path=path)
        yield view


def read_exactly(descriptor: int, nbytes: int, *, offset: int, path: Path) -> bytes:
    """Return exactly `nbytes` bytes from `offset` on; see `read_into`."""
    data = bytearray(nbytes)
    read_into(descriptor, memoryview(data), offset=offset, path=path)
    return bytes(data)
