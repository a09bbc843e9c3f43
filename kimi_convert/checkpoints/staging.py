"""Own an output folder alone, and keep unfinished files where no loader looks.

Everything unfinished lies in `.kimi-convert-partial/` inside the output folder: on the same file
system even where the folder is a mount point. Its lock file belongs to one live process; the
system drops the lock when that process dies, so what a dead one left can be told: it is removed,
or kept for a run that resumes where a journal says that files were finished.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import socket
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from kimi_convert.checkpoints.disk import disk_errors
from kimi_convert.checkpoints.journal import JOURNAL_FILE, JournalState, read_journal
from kimi_convert.checkpoints.messages import listed, quoted
from kimi_convert.errors import OutputError

PARTIAL_FOLDER = ".kimi-convert-partial"
LOCK_FILE = "lock"

_ATTEMPTS = 20
_NEW_FOLDER = "Choose a new or empty folder for the output."
_INTERRUPTED = (
    "A run was killed while it moved finished files into this folder. Remove the folder, then run "
    "again; or go on with `convert --resume`."
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Staging:
    """A claimed output folder; ends with `discard`, `suspend` or `close`, each once."""

    folder: Path
    created: tuple[Path, ...]  # folders made for it, the innermost first
    lock: int  # file descriptor
    resumed: JournalState | None = None  # what an interrupted run has finished

    @property
    def path(self) -> Path:
        """Where unfinished files lie."""
        return self.folder / PARTIAL_FOLDER

    def close(self) -> None:
        """Remove the partial folder and give up the lock; what is outside of it stays."""
        try:
            _empty(self.path)
            # The lock file goes last and while the lock is held: see `_is_in_place`.
            (self.path / LOCK_FILE).unlink(missing_ok=True)
            self.path.rmdir()
        except OSError as error:
            _log.warning("%s could not be removed: %s", self.path, error.strerror)
        finally:
            os.close(self.lock)

    def keep_only(self, names: Collection[str]) -> None:
        """Remove every unfinished file but those named, the journal and the lock.

        Raises:
            ResourceError: one cannot be removed.
        """
        with disk_errors(self.path, doing="remove unfinished files"):
            _empty(self.path, keep={*names, JOURNAL_FILE})

    def suspend(self) -> None:
        """Give up the lock alone: a later run may go on from what is there."""
        os.close(self.lock)

    def discard(self) -> None:
        """Like `close`, and remove the folders that were made for the output."""
        self.close()
        _remove_folders(self.created)


def claim_folder(folder: Path, *, source: Path | None, resume: bool = False) -> Staging:
    """Create the folder if need be, lock it, and remove what a dead process left in it.

    Args:
        folder: new or empty, but for what an interrupted run left.
        source: a folder that it must be apart from.
        resume: keep what an interrupted run has finished; without it, such a folder is refused.

    Raises:
        OutputError: it is a file, not empty, in use by a live process, holds the finished files
            of an interrupted run, or is, holds or lies in the source folder.
        ResourceError: it cannot be written.
    """
    folder = _resolved(folder)
    if source is not None:
        _check_apart(folder, _resolved(source))
    for _ in range(_ATTEMPTS):
        _check_empty(folder, moved=_moved(folder) if resume else ())
        created = _make_folders(folder)
        lock = None
        try:
            lock = _lock(folder / PARTIAL_FOLDER)
        finally:
            if lock is None:  # refused, or the last owner got in between
                _remove_folders((folder / PARTIAL_FOLDER, *created))
        if lock is not None:
            return _claimed(Staging(folder, created, lock), resume=resume)
    raise OutputError("output folder keeps changing", where=folder, hint=_NEW_FOLDER)


def _claimed(staging: Staging, *, resume: bool) -> Staging:
    """Take over a folder that is locked now."""
    try:
        state = read_journal(staging.path)
        if state is not None and state.finished:
            if not resume:
                _refuse_interrupted(staging, state)
            _move_back(staging, state)
            staging = replace(staging, resumed=state)
    except BaseException:
        staging.suspend()
        raise
    try:
        _take_over(staging)
    except BaseException:
        if staging.resumed is None:
            staging.discard()
        else:
            staging.suspend()
        raise
    return staging


def _moved(folder: Path) -> tuple[str, ...]:
    """Return the files that an interrupted run may have moved into place."""
    state = read_journal(folder / PARTIAL_FOLDER)
    return () if state is None else state.moving


def _move_back(staging: Staging, state: JournalState) -> None:
    """Take back what was moved into place, the index first: half an output must not load."""
    with disk_errors(staging.folder, doing="go on from an interrupted run"):
        for name in reversed(state.moving):
            place = staging.folder / name
            if place.is_file() and not place.is_symlink():
                place.rename(staging.path / name)


def _refuse_interrupted(staging: Staging, state: JournalState) -> NoReturn:
    owner = os.pread(staging.lock, 200, 0).decode("utf-8", "replace").strip()
    raise OutputError(
        "output folder holds an interrupted run",
        where=staging.folder,
        found=f"{len(state.finished)} finished files of {owner or 'an earlier process'}",
        hint=f"`convert --resume` goes on from them; remove {staging.path} to start anew.",
    )


def _resolved(folder: Path) -> Path:
    """Return the real path, so that no link and no change of directory can move it."""
    try:
        return folder.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise OutputError("not a usable path", where=quoted(str(folder)), found=error) from error


def _check_apart(folder: Path, source: Path) -> None:
    if _same(folder, source):
        problem = "is the source folder"
    elif any(_same(parent, source) for parent in folder.parents):
        problem = "lies inside the source folder"
    elif any(_same(parent, folder) for parent in source.parents):
        problem = "holds the source folder"
    else:
        return
    raise OutputError(f"output folder {problem}", where=folder, found=source, hint=_NEW_FOLDER)


def _same(one: Path, other: Path) -> bool:
    """Tell one folder under two names too: bind mounts, file systems that ignore case."""
    try:
        return one == other or one.samefile(other)
    except OSError:
        return False


def _check_empty(folder: Path, *, moved: Collection[str] = ()) -> None:
    with disk_errors(folder, doing="look into the output folder"):
        try:
            names = [path.name for path in folder.iterdir()]
        except FileNotFoundError:
            return
        except NotADirectoryError as error:
            raise OutputError(
                "output folder, or a folder above it, is a file", where=folder, hint=_NEW_FOLDER
            ) from error
    others = sorted(name for name in names if name != PARTIAL_FOLDER and name not in moved)
    partial = folder / PARTIAL_FOLDER
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        others.append(PARTIAL_FOLDER)  # not made by us: a link could lead anywhere
    if others:
        raise OutputError(
            "output folder is not empty",
            where=folder,
            found=listed(others),
            hint=_INTERRUPTED if PARTIAL_FOLDER in names else _NEW_FOLDER,
        )


def _make_folders(folder: Path) -> tuple[Path, ...]:
    """Create a folder and those above it; return the new ones, the innermost first."""
    created: list[Path] = []
    try:
        with disk_errors(folder, doing="create the output folder"):
            missing = [path for path in (folder, *folder.parents) if not path.exists()]
            for path in reversed(missing):
                path.mkdir(exist_ok=True)
                created.insert(0, path)
    except BaseException:
        _remove_folders(created)
        raise
    return tuple(created)


def _remove_folders(folders: Sequence[Path]) -> None:
    """Remove folders, the innermost first, up to the first that is not empty or not ours."""
    for folder in folders:
        try:
            folder.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            return


def _lock(partial: Path) -> int | None:
    """Return the locked file's descriptor, or None if the last owner removed it meanwhile."""
    with disk_errors(partial, doing="lock the output folder"):
        try:
            partial.mkdir(exist_ok=True)
            lock = _open_lock_file(partial)
        except FileNotFoundError:
            return None
        try:
            _acquire(lock, partial)
            if _is_in_place(lock, partial / LOCK_FILE):
                return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
        return None


def _open_lock_file(partial: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    folder = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return os.open(LOCK_FILE, flags, 0o666, dir_fd=folder)
    finally:
        os.close(folder)


def _acquire(lock: int, partial: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputError(
            "another process is writing to the output folder",
            where=partial.parent,
            found=os.pread(lock, 200, 0).decode("utf-8", "replace").strip(),
            hint="Wait for it to end, or choose another folder for the output.",
        ) from error


def _is_in_place(lock: int, path: Path) -> bool:
    """Tell whether a locked file still has its name.

    The owner removes the file while it holds the lock; whoever opened it before that and locks
    it after that holds a lock on nothing.
    """
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except FileNotFoundError:
        return False


def _take_over(staging: Staging) -> None:
    _check_empty(staging.folder)  # again: the last owner may have finished in between
    with disk_errors(staging.path, doing="prepare the output folder"):
        if staging.resumed is None:
            _empty(staging.path)
        os.ftruncate(staging.lock, 0)
        os.write(staging.lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode())


def _empty(partial: Path, *, keep: Collection[str] = ()) -> None:
    for path in list(partial.iterdir()):
        if path.name in keep:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK_FILE:
            path.unlink()
