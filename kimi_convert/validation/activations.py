"""Hidden states of all tokens on their way through the layers: in memory, or in a file.

The file loses its name as soon as it is made, so nothing of it is left however the program ends. Its
room on the disk is taken at once: what begins does not run out of it. It is mapped, so rows are read
and written like memory; their pages are given back after each batch.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from kimi_convert.checkpoints.disk import disk_errors

Head = Callable[[torch.Tensor], torch.Tensor]


class Activations:
    """Hidden states [N, T, D], read and replaced some sequences at a time."""

    def __init__(
        self, shape: torch.Size, *, dtype: torch.dtype, device: torch.device, on_disk: bool
    ) -> None:
        """Take the room; values come by `replace`.

        Args:
            shape: [N, T, D].
            dtype: of the values.
            device: that layers run on, and that rows are handed out on.
            on_disk: keep them in a file, in the system's folder for temporary ones.

        Raises:
            ResourceError: there is no room on the disk.
        """
        self.device = device
        self._mapped: mmap.mmap | None = None
        if on_disk:
            self._mapped = _nameless_file(shape.numel() * dtype.itemsize)
            self.values = torch.frombuffer(self._mapped, dtype=dtype).view(shape)
        else:
            self.values = torch.empty(shape, dtype=dtype, device=device)
        self._finite = torch.ones((), dtype=torch.bool, device=device)

    def __len__(self) -> int:
        """Return N."""
        return len(self.values)

    @property
    def finite(self) -> bool:
        """Whether everything that was ever put here is neither NaN nor Inf."""
        return bool(self._finite)

    def rows(self, rows: slice) -> torch.Tensor:
        """Return some sequences [n, T, D] on the device; not to be written to."""
        return self.values[rows].to(self.device)

    def replace(self, rows: slice, values: torch.Tensor) -> None:
        """Put the hidden states of some sequences, a layer further, in the place of the old."""
        self._finite &= values.isfinite().all()
        self.values[rows] = values
        self._give_back()

    def clone(self, *, batch_rows: int) -> Activations:
        """Return a copy, kept where these are."""
        copy = Activations(
            self.values.shape,
            dtype=self.values.dtype,
            device=self.device,
            on_disk=self._mapped is not None,
        )
        for rows in batches(len(self), batch_rows):
            copy.replace(rows, self.rows(rows))
            self._give_back()
        return copy

    def into(self, head: Head) -> Head:
        """Return a head that takes `values` from where they are."""

        def apply(hidden: torch.Tensor) -> torch.Tensor:
            logits = head(hidden.to(self.device))
            self._give_back()
            return logits

        return apply

    def _give_back(self) -> None:
        """Let go of pages: what was written to them is the file's."""
        if self._mapped is not None:
            self._mapped.madvise(mmap.MADV_DONTNEED)


def batches(count: int, batch_rows: int) -> list[slice]:
    """Cut so many sequences into runs of at most `batch_rows`."""
    return [slice(start, start + batch_rows) for start in range(0, count, batch_rows)]


def scratch_folder() -> Path:
    """Return where files of activations lie; TMPDIR chooses another."""
    return Path(tempfile.gettempdir())


def _nameless_file(nbytes: int) -> mmap.mmap:
    folder = scratch_folder()
    with (
        disk_errors(folder, doing="keep activations on disk", nbytes=nbytes),
        tempfile.TemporaryFile(dir=folder) as file,
    ):
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, nbytes)
        else:  # macOS: the file has its size, and no room yet
            file.truncate(nbytes)
        return mmap.mmap(file.fileno(), nbytes)
