"""Add files to a folder that exists, all of them or none, and over none that is there.

    with add_files(folder, ("model.onnx",)) as addition:
        addition.path("model.onnx").write_bytes(data)

Until the end of the block the files have hidden names in the same folder, so that what they refer to
beside them can be checked. Then each gets its name, which fails where the name has been taken.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kimi_convert.checkpoints.disk import disk_errors, sync_folder
from kimi_convert.errors import OutputError, ResourceError


@dataclass(frozen=True, slots=True)
class Addition:
    """Files that have no name yet."""

    folder: Path
    names: tuple[str, ...]

    def path(self, name: str) -> Path:
        """Return where a file is written before it gets its name."""
        assert name in self.names
        return self.folder / f".{name}.{os.getpid()}.partial"


@contextmanager
def add_files(folder: Path, names: Sequence[str]) -> Generator[Addition]:
    """Let what is written inside the block appear at its end.

    Raises:
        OutputError: one of the names is taken.
        ResourceError: the folder cannot be written, or the disk is full.
    """
    addition = Addition(folder, tuple(names))
    taken = [name for name in names if os.path.lexists(folder / name)]
    if taken:
        raise _taken(folder / taken[0])
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ResourceError(
            "cannot write into the folder",
            where=folder,
            found="no permission",
            hint="Get permission to write there, or copy the checkpoint to another folder.",
        )
    try:
        with disk_errors(folder, doing="add a file to the folder"):
            yield addition
            _commit(addition)
    finally:
        for name in names:
            addition.path(name).unlink(missing_ok=True)


def _commit(addition: Addition) -> None:
    begun: list[Path] = []
    try:
        for name in addition.names:
            partial = addition.path(name)
            _sync(partial)
            try:
                # Unlike a rename, a link never replaces a file.
                (addition.folder / name).hardlink_to(partial)
            except FileExistsError as error:
                raise _taken(addition.folder / name) from error
            begun.append(addition.folder / name)
        sync_folder(addition.folder)
    except BaseException:
        for path in begun:
            path.unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _taken(path: Path) -> OutputError:
    return OutputError(
        "file exists already",
        where=path,
        hint="Move it away or remove it, then run again.",
    )
