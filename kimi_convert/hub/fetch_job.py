"""The files of one download: in parallel, each locked, checked and put in its place.

The first failure ends the job; what was fetched until then stays for the next run.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from kimi_convert.checkpoints.disk import disk_errors, free_bytes
from kimi_convert.checkpoints.messages import sized
from kimi_convert.config.progress import ProgressCallback, ProgressEvent
from kimi_convert.errors import OutputError, ResourceError
from kimi_convert.hub.listing import RemoteFile
from kimi_convert.hub.places import LAST_FILES, FolderPlace, Place
from kimi_convert.hub.selection import Selection
from kimi_convert.hub.transfer import Digest, StoppedError, Transfer, hash_file

_STAGE = "downloading"
_REPORT_S = 0.1
_POLL_S = 0.2
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FetchedFile:
    """One file of a download."""

    path: str
    nbytes: int
    sha256: str | None  # None in a dry run, and where an earlier run has checked it
    was_there: bool

    def to_json(self) -> dict[str, object]:
        """Return the file's entry in the document of `download --json`."""
        return {
            "name": self.path,
            "size": self.nbytes,
            "sha256": self.sha256,
            "was_there": self.was_there,
        }


class SmallFiles:
    """Contents that must be known before anything is fetched; each is read once."""

    def __init__(self, transfer: Transfer, place: Place) -> None:
        """Know nothing yet."""
        self._transfer = transfer
        self._place = place
        self.known: dict[str, bytes] = {}

    def read(self, file: RemoteFile) -> bytes:
        """Return the content of a small file, checked; from the disk if it is there."""
        if file.path not in self.known:
            there = self._place.is_finished(file)
            data = self._place.content(file).read_bytes() if there else self._transfer.read(file)
            self.known[file.path] = data
        return self.known[file.path]


@dataclass(slots=True)
class _Meter:
    """Bytes that are there, over all and of each file; told of by several threads."""

    total: int
    report: ProgressCallback
    done: int = 0
    _of_file: dict[str, int] = field(default_factory=dict[str, int])
    _told: dict[str, float] = field(default_factory=dict[str, float])
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, file: RemoteFile, nbytes: int) -> None:
        with self._lock:
            self.done += nbytes
            of_file = self._of_file.get(file.path, 0) + nbytes
            self._of_file[file.path] = of_file
            self._tell(file.path, of_file, file.nbytes)
            self._tell(_STAGE, self.done, self.total)

    def start(self) -> None:
        """Tell of the whole before any file, so that its bar comes first."""
        self.report(ProgressEvent(_STAGE, 0, self.total, "bytes"))

    def skip(self, file: RemoteFile) -> None:
        """Count a file that was there, without a word of its own."""
        with self._lock:
            self.done += file.nbytes
            self._tell(_STAGE, self.done, self.total)

    def _tell(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - self._told.get(stage, 0.0) >= _REPORT_S:
            self._told[stage] = now
            self.report(ProgressEvent(stage, done, total, "bytes"))


class Job:
    """Fetches what was selected into a place."""

    def __init__(
        self,
        transfer: Transfer,
        place: Place,
        selection: Selection,
        known: Mapping[str, bytes],
        on_progress: ProgressCallback,
    ) -> None:
        """Look what is there already; nothing is read or written."""
        self._transfer = transfer
        self._place = place
        self._wanted = selection.files
        self._known = known
        self._meter = _Meter(selection.nbytes, on_progress)
        self._done = {
            file.path: FetchedFile(file.path, file.nbytes, None, was_there=True)
            for file in selection.files
            if place.is_finished(file)
        }

    def files(self) -> tuple[FetchedFile, ...]:
        """Return every wanted file as it stands."""
        return tuple(
            self._done.get(file.path) or FetchedFile(file.path, file.nbytes, None, was_there=False)
            for file in self._wanted
        )

    def require_space(self) -> None:
        """Check, before the first byte, that the disk has room for what is missing.

        Raises:
            ResourceError: it has not.
        """
        missing = [file for file in self._wanted if file.path not in self._done]
        needed = sum(max(0, file.nbytes - _size(self._place.part(file))) for file in missing)
        there = sum(min(file.nbytes, _size(self._place.content(file))) for file in missing)
        free = free_bytes(self._place.folder)
        if free is not None and free < needed - there:
            raise ResourceError(
                "not enough disk space for the download",
                where=self._place.folder,
                expected=sized(needed - there),
                found=f"{sized(free)} free",
                hint="Free space there, choose another disk with --local-dir or HF_HOME, or "
                "leave files out with --exclude.",
            )

    def fetch(self, max_workers: int) -> None:
        """Fetch what is missing, what makes the folder loadable last.

        Raises:
            HubError, VerificationError, ResourceError, OutputError: see `download_checkpoint`.
        """
        if len(self._done) < len(self._wanted):
            self._check_in_the_way()
            wanted = {file.path for file in self._wanted}
            for path in self._place.take_apart(self._transfer.snapshot, wanted):
                self._done.pop(path, None)
        self._meter.start()
        for file in self._wanted:
            if file.path in self._done:
                self._meter.skip(file)
        for files in _steps(self._wanted):
            missing = [file for file in files if file.path not in self._done]
            # The largest first, so that no worker is left alone with one at the end.
            missing.sort(key=lambda file: file.nbytes, reverse=True)
            self._in_parallel(missing, max_workers)
            for file in files:
                self._place.show(file)

    def _in_parallel(self, files: Sequence[RemoteFile], max_workers: int) -> None:
        with ThreadPoolExecutor(max_workers, thread_name_prefix="download") as pool:
            running = {pool.submit(self._one, file) for file in files}
            try:
                while running:
                    done, running = wait(running, timeout=_POLL_S, return_when=FIRST_EXCEPTION)
                    for future in done:
                        future.result()
            except BaseException:
                self._transfer.stop.set()
                for future in running:
                    future.cancel()
                raise

    def _one(self, file: RemoteFile) -> None:
        with self._place.locked(file, waiting=self._check_going):
            self._done[file.path] = self._whole(file)

    def _check_going(self) -> None:
        if self._transfer.stop.is_set():
            raise StoppedError

    def _whole(self, file: RemoteFile) -> FetchedFile:
        """Have the file in its place, from another process, an earlier run, or the Hub."""
        if self._place.is_finished(file):
            self._meter.skip(file)
            return FetchedFile(file.path, file.nbytes, None, was_there=True)
        digest = self._of_unknown_origin(file)
        if digest is not None and digest.is_right:
            self._place.mark_finished(file)
            self._meter.skip(file)
            return FetchedFile(file.path, file.nbytes, digest.sha256, was_there=True)
        if digest is not None:
            self._check_replaceable(file)
            name = self._place.content(file)
            _log.warning("%s is not what the repository lists; fetching it again", name)
        part = self._place.part(file)
        if file.path in self._known:
            sha256 = self._store(file, part, self._known[file.path])
        else:
            sha256 = self._transfer.fetch(
                file, part, on_bytes=lambda nbytes: self._meter.add(file, nbytes)
            )
        self._place.finish(file)
        return FetchedFile(file.path, file.nbytes, sha256, was_there=False)

    def _store(self, file: RemoteFile, part: Path, data: bytes) -> str:
        """Write a content that was read, and checked, before."""
        with disk_errors(part, doing="write to the download folder", nbytes=len(data)):
            part.write_bytes(data)
        digest = Digest(file)
        digest.update(data)
        self._meter.add(file, len(data))
        return digest.sha256

    def _of_unknown_origin(self, file: RemoteFile) -> Digest | None:
        """Hash what lies in the file's place, if anything does."""
        content = self._place.content(file)
        if not content.exists():
            return None
        if _size(content) != file.nbytes:
            return Digest(file)
        return hash_file(content, file, stop=self._transfer.stop)

    def _check_in_the_way(self) -> None:
        """Refuse, before anything is fetched, what is seen to be in the way by its size."""
        for file in self._wanted:
            content = self._place.content(file)
            if content.exists() and _size(content) != file.nbytes:
                self._check_replaceable(file)

    def _check_replaceable(self, file: RemoteFile) -> None:
        """Refuse to replace what may be a user's own work."""
        place, content = self._place, self._place.content(file)
        if isinstance(place, FolderPlace) and not place.was_fetched(file.path):
            raise OutputError(
                "a file of the folder is in the way: it is another than the repository's",
                where=content,
                hint="Move it away, or choose another folder with --local-dir.",
            )


def _steps(files: Sequence[RemoteFile]) -> list[list[RemoteFile]]:
    """Return the files in groups: each is whole before the next is begun."""
    first = [file for file in files if file.path not in LAST_FILES]
    return [first, *([file for file in files if file.path == name] for name in LAST_FILES)]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
