"""Weights from the Hub one file at a time: fetched when they are read, freed when nothing will.

A conversion then needs room for its output and for the files in use, not for a second copy of the
source. What is fetched lies in OUTPUT.source, beside the output, until the conversion is done: after
an interrupt the same call goes on from there.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kimi_convert.checkpoints.disk import disk_errors, free_bytes
from kimi_convert.checkpoints.index import ShardFile
from kimi_convert.checkpoints.manifest import CARD_FILE, SMALL_CONTENT_FILES
from kimi_convert.checkpoints.messages import sized
from kimi_convert.checkpoints.origin import ORIGIN_FILE
from kimi_convert.checkpoints.weight_map import INDEX_FILE
from kimi_convert.config.huggingface import CONFIG_FILE
from kimi_convert.config.progress import ProgressCallback, ProgressEvent
from kimi_convert.errors import OutputError, ResourceError
from kimi_convert.hub.headers import write_headers
from kimi_convert.hub.listing import RemoteFile
from kimi_convert.hub.places import origin_text
from kimi_convert.hub.reference import Reference
from kimi_convert.hub.remote import Snapshot, connect
from kimi_convert.hub.transfer import Transfer

WORK_SUFFIX = ".source"

_HEADERS, _WEIGHTS = "headers", "weights"


@dataclass(frozen=True, slots=True)
class StreamedSource:
    """A folder of headers, and where the weights behind them come from."""

    folder: Path
    weights: HubShards


@dataclass(slots=True)
class HubShards:
    """The files of weights of a snapshot; at most those in use are on the disk."""

    transfer: Transfer
    folder: Path
    on_progress: ProgressCallback

    def provide(self, shard: str) -> ShardFile:
        """Return a file, fetched and checked; it stays until it is released.

        Raises:
            HubError: it cannot be fetched.
            VerificationError: it is not what the repository lists.
            ResourceError: the disk has no room for it.
        """
        file = self.transfer.snapshot.files[shard]
        path = self.folder / shard
        if not path.exists():
            part = path.with_name(f"{shard}.incomplete")
            self._require_space(file.nbytes, part)
            self.transfer.fetch(file, part, on_bytes=_Meter(file, self.on_progress).add)
            with disk_errors(path, doing="write beside the output"):
                part.replace(path)
        status = path.stat()
        return ShardFile(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def release(self, shard: str) -> None:
        """Remove a file that nothing will read any more."""
        (self.folder / shard).unlink(missing_ok=True)

    def _require_space(self, nbytes: int, part: Path) -> None:
        there = part.stat().st_size if part.exists() else 0
        free = free_bytes(self.folder)
        if free is not None and free < nbytes - there:
            raise ResourceError(
                "not enough disk space for the next file of the source",
                where=self.folder,
                expected=sized(nbytes - there),
                found=f"{sized(free)} free",
                hint="Free space there and run again with --resume: it goes on from here.",
            )


@dataclass(slots=True)
class _Meter:
    """Bytes of one file."""

    file: RemoteFile
    report: ProgressCallback
    done: int = 0

    def add(self, nbytes: int) -> None:
        self.done += nbytes
        stage = f"fetching {self.file.path}"
        self.report(ProgressEvent(stage, self.done, self.file.nbytes, "bytes"))


@contextmanager
def streamed_source(
    reference: Reference, output: Path, *, on_progress: ProgressCallback
) -> Generator[StreamedSource]:
    """Give a source whose weights come as they are read; its folder goes when all went well.

    Args:
        reference: the checkpoint on the Hub.
        output: what the folder of the source lies beside.
        on_progress: told of the bytes of each file.

    Raises:
        HubError, CheckpointError: it cannot be fetched, or is not a checkpoint.
        OutputError: another process streams a source for the same output.
        ResourceError: the folder cannot be written.
    """
    remote = connect()
    snapshot = remote.pin(reference)
    transfer = Transfer(remote, snapshot)
    work = work_folder(output)
    headers, weights = work / _HEADERS, work / f"{_WEIGHTS}-{snapshot.commit[:12]}"
    with _locked(work):
        try:
            _write_headers(transfer, headers)
            weights.mkdir(exist_ok=True)
            yield StreamedSource(headers, HubShards(transfer, weights, on_progress))
        except BaseException:
            if not (weights.is_dir() and any(weights.iterdir())):
                shutil.rmtree(work, ignore_errors=True)  # nothing in it is worth keeping
            raise
        shutil.rmtree(work)


def work_folder(output: Path) -> Path:
    """Return the folder of what is fetched, beside the output."""
    resolved = output.resolve()
    return resolved.with_name(resolved.name + WORK_SUFFIX)


@contextmanager
def _locked(work: Path) -> Generator[None]:
    """Own the folder: the system drops the lock when the process dies."""
    with disk_errors(work, doing="write beside the output"):
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _acquire(lock, work)
        yield
    finally:
        os.close(lock)


def _acquire(lock: int, work: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputError(
            "another process streams a source for this output",
            where=work,
            hint="Wait for it to end, or choose another folder for the output.",
        ) from error


def _write_headers(transfer: Transfer, folder: Path) -> None:
    """Make the folder of headers anew."""
    snapshot = transfer.snapshot
    with disk_errors(folder, doing="write beside the output"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        _fill(folder, snapshot, transfer)
        for shard in write_headers(transfer.remote, snapshot, folder):
            # A conversion tells by size and time whether its source is the same as before.
            os.utime(folder / shard.path, ns=(_time_ns(snapshot), _time_ns(snapshot)))


def _fill(folder: Path, snapshot: Snapshot, transfer: Transfer) -> None:
    """Write the small files that `write_headers` does not, and where all come from."""
    for name in (*SMALL_CONTENT_FILES, CARD_FILE):
        if name in snapshot.files and name not in (CONFIG_FILE, INDEX_FILE):
            (folder / name).write_bytes(transfer.read(snapshot.files[name]))
    origin = folder / ORIGIN_FILE
    origin.parent.mkdir(parents=True)
    origin.write_text(origin_text(snapshot), encoding="utf-8")


def _time_ns(snapshot: Snapshot) -> int:
    return int(snapshot.commit[:8], 16) * 10**9
