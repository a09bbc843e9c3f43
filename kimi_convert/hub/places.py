"""Where downloaded files lie: in the Hub's cache, as other programs share it, or in a folder.

Either way a file appears under its name only when all of it is there and its hash is right, and
a mark beside it says so, so that the next run need not read a terabyte to know. Unfinished files
lie apart, under the hash of what they will be: the next run goes on with them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants

from kimi_convert.checkpoints.disk import disk_errors
from kimi_convert.checkpoints.origin import ORIGIN_FILE, read_origin
from kimi_convert.checkpoints.weight_map import INDEX_FILE
from kimi_convert.config.huggingface import CONFIG_FILE
from kimi_convert.hub.listing import RemoteFile
from kimi_convert.hub.reference import is_commit
from kimi_convert.hub.remote import Snapshot

# Without these no loader takes the folder: they come last.
LAST_FILES = (CONFIG_FILE, INDEX_FILE)

_LOCK_POLL_S = 0.05


class Place(ABC):
    """A place for the files of one repository."""

    def __init__(self, folder: Path, state: Path) -> None:
        """Create nothing yet.

        Args:
            folder: where a reader finds the files under their names.
            state: where marks lie.
        """
        self.folder = folder
        self._state = state

    @abstractmethod
    def content(self, file: RemoteFile) -> Path:
        """Return where the bytes of a finished file lie."""

    @abstractmethod
    def part(self, file: RemoteFile) -> Path:
        """Return where the bytes of an unfinished file lie."""

    @abstractmethod
    def lock_path(self, file: RemoteFile) -> Path:
        """Return the file that the process which fetches a file locks."""

    @abstractmethod
    def note_origin(self, snapshot: Snapshot) -> None:
        """Remember of which commit the files are."""

    @abstractmethod
    def show(self, file: RemoteFile) -> None:
        """Let a finished file appear under its name."""

    def take_apart(self, snapshot: Snapshot, wanted: Collection[str]) -> tuple[str, ...]:
        """Make a checkpoint of another commit unloadable before files replace its own.

        Returns:
            The paths of the files that were removed, of those that are wanted.
        """
        return ()

    def is_finished(self, file: RemoteFile) -> bool:
        """Tell whether the file is there, and as it was when its hash was found right."""
        try:
            return self._mark(file).read_text("ascii") == _fingerprint(self.content(file))
        except (OSError, ValueError):
            return False

    def mark_finished(self, file: RemoteFile) -> None:
        """Note that the file's hash was found right."""
        mark = self._mark(file)
        with disk_errors(mark, doing="write to the download folder"):
            mark.parent.mkdir(parents=True, exist_ok=True)
            _write(mark, _fingerprint(self.content(file)))

    def finish(self, file: RemoteFile) -> None:
        """Move a whole and right part to where it belongs."""
        part, content = self.part(file), self.content(file)
        with disk_errors(content, doing="write to the download folder"):
            content.parent.mkdir(parents=True, exist_ok=True)
            part.replace(content)
        self.mark_finished(file)

    @contextmanager
    def locked(self, file: RemoteFile, *, waiting: Callable[[], None]) -> Generator[None]:
        """Keep other processes from fetching the same file; `waiting` is called while one does."""
        path = self.lock_path(file)
        with disk_errors(path, doing="write to the download folder"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.part(file).parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            while not _try_lock(lock):
                waiting()
                time.sleep(_LOCK_POLL_S)
            yield
        finally:
            os.close(lock)

    def _mark(self, file: RemoteFile) -> Path:
        return self._state / "verified" / file.etag


class CachePlace(Place):
    """The cache of huggingface_hub: blobs named by hash, and snapshots of links to them."""

    def __init__(self, cache: Path, snapshot: Snapshot) -> None:
        """Use the cache's folder of the repository."""
        name = "--".join(("models", *snapshot.reference.repository.split("/")))
        self._storage = cache / name  # as huggingface_hub names it
        self._locks = cache / ".locks" / name
        super().__init__(self._storage / "snapshots" / snapshot.commit, self._storage)

    def content(self, file: RemoteFile) -> Path:
        """Return the blob."""
        return self._storage / "blobs" / file.etag

    def part(self, file: RemoteFile) -> Path:
        """Return the unfinished blob; huggingface_hub itself uses names of one process each."""
        return self._storage / "blobs" / f"{file.etag}.incomplete"

    def lock_path(self, file: RemoteFile) -> Path:
        """Return the file that huggingface_hub locks for the same blob."""
        return self._locks / f"{file.etag}.lock"

    def show(self, file: RemoteFile) -> None:
        """Link to the blob from the snapshot."""
        link = self.folder / file.path
        target = os.path.relpath(self.content(file), link.parent)
        with disk_errors(link, doing="write to the download folder"):
            link.parent.mkdir(parents=True, exist_ok=True)
            if not (link.is_symlink() and link.readlink() == Path(target)):
                fresh = link.with_name(f".{link.name}.{os.getpid()}")
                fresh.unlink(missing_ok=True)
                fresh.symlink_to(target)
                fresh.replace(link)

    def note_origin(self, snapshot: Snapshot) -> None:
        """Remember which commit a branch or tag is, for when the Hub cannot be asked."""
        revision = snapshot.reference.revision
        if not is_commit(revision):
            path = self._storage / "refs" / revision
            with disk_errors(path, doing="write to the download folder"):
                path.parent.mkdir(parents=True, exist_ok=True)
                _write(path, snapshot.commit)


class FolderPlace(Place):
    """A plain folder; state and parts lie where uploads by huggingface_hub leave them out."""

    def __init__(self, folder: Path) -> None:
        """Use a folder that may exist."""
        super().__init__(folder, folder / ".cache" / "huggingface" / "kimi-convert")

    def content(self, file: RemoteFile) -> Path:
        """Return the file under its name."""
        return self.folder / file.path

    def part(self, file: RemoteFile) -> Path:
        """Return the unfinished file."""
        return self._state / f"{file.etag}.incomplete"

    def lock_path(self, file: RemoteFile) -> Path:
        """Return a file of the state's folder."""
        return self._state / f"{file.etag}.lock"

    def show(self, file: RemoteFile) -> None:
        """Do nothing: the file lies under its name."""

    def take_apart(self, snapshot: Snapshot, wanted: Collection[str]) -> tuple[str, ...]:
        """Remove what makes the folder loadable, if it is of another commit."""
        origin = read_origin(self.folder)
        if origin is None or origin.commit == snapshot.commit:
            return ()
        removed = [
            name
            for name in LAST_FILES
            if name in wanted and (self.folder / name).exists() and self.was_fetched(name)
        ]
        with disk_errors(self.folder, doing="write to the download folder"):
            for name in removed:
                (self.folder / name).unlink()
        return tuple(removed)

    def note_origin(self, snapshot: Snapshot) -> None:
        """Write repository and commit beside the marks."""
        path = self.folder / ORIGIN_FILE
        with disk_errors(path, doing="write to the download folder"):
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, origin_text(snapshot))

    def finished_files(self) -> dict[str, RemoteFile]:
        """Return the files that downloads have left here and nobody has changed since."""
        marks = self._state / "verified"
        found: dict[str, RemoteFile] = {}
        for mark in marks.rglob("*"):
            name, _, etag = mark.relative_to(marks).as_posix().rpartition(".")
            content = self.folder / name
            if mark.is_file() and content.is_file():
                file = file_of(name, content.stat().st_size, etag)
                if self.is_finished(file):
                    found[name] = file
        return found

    def _mark(self, file: RemoteFile) -> Path:
        # By path, not by hash: two files of the same content are two files here.
        return self._state / "verified" / f"{file.path}.{file.etag}"

    def was_fetched(self, path: str) -> bool:
        """Tell whether what lies under the name came from a download, of whatever commit."""
        name = self._state / "verified" / path
        theirs = self._state.parent / "download" / f"{path}.metadata"
        return theirs.exists() or any(name.parent.glob(f"{_escaped(name.name)}.*"))


def origin_text(snapshot: Snapshot) -> str:
    """Return the text of a folder's file that says where it came from."""
    origin = {
        "repository": snapshot.reference.repository,
        "revision": snapshot.reference.revision,
        "commit": snapshot.commit,
    }
    return json.dumps(origin, indent=2) + "\n"


def file_of(path: str, nbytes: int, etag: str) -> RemoteFile:
    """Return a file as the repository lists it, from the name of its content."""
    in_lfs = len(etag) == len(hashlib.sha256().hexdigest())
    return RemoteFile(path, nbytes, "" if in_lfs else etag, etag if in_lfs else None)


def cache_folder() -> Path:
    """Return the Hub's cache, as HF_HUB_CACHE or HF_HOME set it."""
    return Path(constants.HF_HUB_CACHE)


def _fingerprint(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}\n"


def _write(path: Path, text: str) -> None:
    fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    fresh.write_text(text, encoding="ascii")
    fresh.replace(path)


def _try_lock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _escaped(name: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)
