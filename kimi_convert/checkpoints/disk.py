"""Write to a disk that may be full, slow to say so, or not ours to write to.

Every refusal of the operating system becomes one error with the numbers a user needs.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from kimi_convert.checkpoints.messages import sized
from kimi_convert.errors import ResourceError


@contextmanager
def disk_errors(path: Path, *, doing: str, nbytes: int = 0) -> Generator[None]:
    """Turn an OSError inside into a ResourceError.

    Args:
        path: the file or folder that is written.
        doing: what is tried, as in "cannot <doing>".
        nbytes: how many bytes it takes, if any.

    Raises:
        ResourceError: with what the system said, the bytes wanted and the bytes free.
    """
    try:
        yield
    except OSError as error:
        found = str(error.strerror or error)
        free = free_bytes(path)
        raise ResourceError(
            f"cannot {doing}",
            where=path,
            expected=f"room for {sized(nbytes)}" if nbytes else "",
            found=found if free is None else f"{found}; {sized(free)} free",
            hint="Free space there, get permission to write, or choose another output folder.",
        ) from error


def free_bytes(path: Path) -> int | None:
    """Return the bytes that an ordinary user may still write where `path` is or will be."""
    for place in (path, *path.absolute().parents):
        try:
            status = os.statvfs(place)
        except OSError:
            continue
        return status.f_bavail * status.f_frsize
    return None


def require_free(folder: Path, nbytes: int) -> None:
    """Check that a disk has room for an output, where it tells.

    Raises:
        ResourceError: fewer than `nbytes` bytes are free.
    """
    free = free_bytes(folder)
    if free is not None and free < nbytes:
        raise ResourceError(
            "not enough disk space for the output",
            where=folder,
            expected=sized(nbytes),
            found=f"{sized(free)} free",
            hint="Free space there, or choose an output folder on another disk.",
        )


def write_all(descriptor: int, data: memoryview) -> None:
    """Write every byte; one call of the system takes at most 2 GiB and may take less."""
    while data:
        data = data[os.write(descriptor, data) :]


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
