"""Copy parts of files by the file system, not through this process.

A file system that shares blocks, or a server that copies, then moves no byte through here. What
arrived is read back, so that what is hashed is what was written.
"""

from __future__ import annotations

import errno
import os

from kimi_convert.checkpoints.disk import write_all
from kimi_convert.checkpoints.reader import Extent
from kimi_convert.checkpoints.regular_file import read_into
from kimi_convert.errors import CheckpointError

# What systems say where two files are not of one kind, as across file systems of older kernels.
_CANNOT_COPY = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)


class FileCopies:
    """Copies to the end of a file that is open for both reading and writing."""

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray())
        self._works = hasattr(os, "copy_file_range")

    def copy(self, extent: Extent, target: int, at: int) -> memoryview:
        """Copy to the end of the target, which is `at`; return what arrived, until the next call."""
        if len(self._buffer) < extent.nbytes:
            self._buffer = memoryview(bytearray(extent.nbytes))
        data = self._buffer[: extent.nbytes]
        if self._works:
            self._works = self._inside_the_kernel(extent, target, at)
        if self._works:
            read_into(target, data, offset=at, path=extent.path)
        else:
            read_into(extent.descriptor, data, offset=extent.start, path=extent.path)
            os.lseek(target, at, os.SEEK_SET)
            write_all(target, data)
        os.lseek(target, at + extent.nbytes, os.SEEK_SET)
        return data

    def _inside_the_kernel(self, extent: Extent, target: int, at: int) -> bool:
        """Copy; False where this pair of files cannot be copied so."""
        done = 0
        while done < extent.nbytes:
            try:
                got = os.copy_file_range(
                    extent.descriptor, target, extent.nbytes - done, extent.start + done, at + done
                )
            except OSError as error:
                if error.errno in _CANNOT_COPY:
                    return False
                raise
            if got == 0:
                raise CheckpointError(
                    "file ends early",
                    where=extent.path,
                    expected=f"at least {extent.start + extent.nbytes} bytes",
                    found=f"{extent.start + done} bytes",
                    hint="The file is cut off; download it again.",
                )
            done += got
        return True
