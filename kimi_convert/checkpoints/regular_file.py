"""Open and read a file that must be a plain file: never a pipe, a device or a folder.

Reads are positional and exact: a short read is an error, not a short answer.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from kimi_convert.errors import CheckpointError


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


def read_exactly(descriptor: int, nbytes: int, *, offset: int, path: Path) -> bytes:
    """Return exactly `nbytes` bytes from `offset` on; see `read_into`."""
    data = bytearray(nbytes)
    read_into(descriptor, memoryview(data), offset=offset, path=path)
    return bytes(data)
