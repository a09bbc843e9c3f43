"""Give an output the blocks of its source, where the file system can: nothing is read or written.

btrfs, XFS, bcachefs and what passes the call on (NFS 4.2, SMB, overlay) let two files share blocks
until one of them changes its own. Only whole blocks at whole blocks can be shared; `shared_layout`
plans files whose tensors lie so.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from types import MappingProxyType

from kimi_convert.checkpoints.index import ShardFile
from kimi_convert.checkpoints.regular_file import open_regular
from kimi_convert.checkpoints.safetensors_header import TensorSpec

BLOCK_BYTES = 4096  # of nearly every file system; where blocks are larger, the call is refused
LEAST_BYTES = 2**20  # of a tensor: a smaller one is written before two files are opened

_NOTHING = range(0)
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_FICLONERANGE = 0x4020940D  # linux/fs.h; another system says that it knows no such call
_ARGUMENT = struct.Struct("=qQQQ")  # source descriptor, its offset, bytes, offset in the target


@dataclass(frozen=True, slots=True)
class Extent:
    """Where the bytes of a tensor lie unchanged."""

    file: ShardFile
    start: int


NO_EXTENTS: Mapping[str, Extent] = MappingProxyType({})


def extents_of(
    copies: Mapping[str, TensorSpec], files: Mapping[str, ShardFile]
) -> Mapping[str, Extent]:
    """Return, by the names they are written under, where tensors lie in files that are there."""
    return {name: Extent(files[stored.shard], stored.start) for name, stored in copies.items()}


@dataclass(frozen=True, slots=True)
class Shareable:
    """Bytes of an output that need no room on a disk that shares blocks with their source."""

    nbytes: int
    files: tuple[Path, ...]  # that hold them

    def bytes_in(self, folder: Path) -> int:
        """Return how many can be shared in a folder: tried with a block of each file.

        Raises:
            CheckpointError: a file cannot be opened.
        """
        if not self.nbytes:
            return 0
        try:
            with TemporaryFile(dir=folder) as target:
                for path in self.files:
                    with open_regular(path) as source:
                        _clone(target.fileno(), 0, source, 0, BLOCK_BYTES)
        except OSError:
            return 0
        return self.nbytes


NOTHING_SHAREABLE = Shareable(0, ())


class Cloner:
    """Shares blocks for one file until the file system refuses: what is not shared is written."""

    def __init__(self, extents: Mapping[str, Extent]) -> None:
        """Take the tensors that are carried over unchanged, by the names they are written under."""
        self._extents = extents

    def clone(self, name: str, target: int, at: int, nbytes: int) -> range:
        """Share the whole blocks of a tensor.

        The source is looked at after the call: bytes read of it before or later are those that were
        shared, as long as it stays unchanged.

        Args:
            name: the tensor.
            target: descriptor of the file that is written.
            at: where the tensor begins in it.
            nbytes: of the tensor.

        Returns:
            The bytes of the target that are there now; none where nothing can be shared.

        Raises:
            CheckpointError: the source has changed or cannot be opened.
            OSError: the disk is full.
        """
        extent = self._extents.get(name)
        if extent is None or nbytes < LEAST_BYTES or (extent.start - at) % BLOCK_BYTES:
            return _NOTHING
        first = -(-at // BLOCK_BYTES) * BLOCK_BYTES
        last = (at + nbytes) // BLOCK_BYTES * BLOCK_BYTES
        with open_regular(extent.file.path) as source:
            try:
                _clone(target, first, source, extent.start + first - at, last - first)
            except OSError as error:
                if error.errno in _FULL:
                    raise
                self._extents = NO_EXTENTS
                return _NOTHING
            extent.file.check_unchanged(os.fstat(source))
        return range(first, last)


def _clone(target: int, at: int, source: int, start: int, nbytes: int) -> None:
    """Let bytes of one open file from `at` on share the blocks of another from `start` on."""
    fcntl.ioctl(target, _FICLONERANGE, _ARGUMENT.pack(source, start, nbytes, at))
