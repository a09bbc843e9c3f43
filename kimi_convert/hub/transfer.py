"""One file from the Hub to the disk: goes on where it was cut, and is right at the end or gone.

Bytes are appended to a part file and hashed on their way. A later run keeps the whole pieces of
what it finds, asks for the rest by range, and hashes both; what does not come out right is
removed. Memory stays at one buffer.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from kimi_convert.checkpoints.disk import disk_errors, write_all
from kimi_convert.checkpoints.messages import sized
from kimi_convert.checkpoints.regular_file import open_regular, read_into
from kimi_convert.errors import CheckpointError, HubError, VerificationError
from kimi_convert.hub.failures import NETWORK_ERRORS, hub_error, may_pass, retry_after_s
from kimi_convert.hub.listing import RemoteFile
from kimi_convert.hub.remote import Remote, Snapshot

# What is kept of a file that was cut: whole pieces of this size. A kill may leave the last one
# short, a power failure may leave it full of zeros; the hash tells in any case.
PIECE_BYTES = 1 << 20

_READ_BYTES = 8 << 20
_MAX_IN_MEMORY = 100_000_000

_log = logging.getLogger(__name__)

OnBytes = Callable[[int], None]  # told how many more bytes are there; negative if some are dropped


class StoppedError(Exception):
    """The transfer was told to stop; the part stays for the next run."""


class _Hash(Protocol):
    """A hash of hashlib."""

    def update(self, data: bytes | memoryview, /) -> None: ...
    def hexdigest(self) -> str: ...


@dataclass(slots=True)
class Digest:
    """The hashes of a file's bytes: SHA-256, and git's if the repository knows no other."""

    file: RemoteFile
    nbytes: int = 0
    _sha256: _Hash = field(default_factory=hashlib.sha256)
    _git: _Hash | None = None

    def __post_init__(self) -> None:
        """Start git's hash, which counts the size in."""
        if self.file.sha256 is None:
            header = f"blob {self.file.nbytes}\0".encode()
            self._git = hashlib.sha1(header, usedforsecurity=False)

    def update(self, data: bytes | memoryview) -> None:
        """Take the next bytes."""
        self._sha256.update(data)
        if self._git is not None:
            self._git.update(data)
        self.nbytes += len(data)

    @property
    def sha256(self) -> str:
        """Return the SHA-256 in hex."""
        return self._sha256.hexdigest()

    @property
    def is_right(self) -> bool:
        """Tell whether these are the bytes that the repository lists."""
        if self.nbytes != self.file.nbytes:
            return False
        if self._git is not None:
            return self._git.hexdigest() == self.file.git_sha1
        return self.sha256 == self.file.sha256


@dataclass(frozen=True, slots=True)
class Transfer:
    """Fetches files of one snapshot; `stop` ends all of its transfers."""

    remote: Remote
    snapshot: Snapshot
    stop: threading.Event = field(default_factory=threading.Event)

    def read(self, file: RemoteFile) -> bytes:
        """Return the content of a small file, checked.

        Raises:
            HubError: it cannot be fetched.
            CheckpointError: it is too large.
            VerificationError: it is not what the repository lists.
        """
        if file.nbytes > _MAX_IN_MEMORY:
            raise CheckpointError(
                "file is larger than a file of this name can be",
                where=self._where(file),
                expected=f"at most {sized(_MAX_IN_MEMORY)}",
                found=sized(file.nbytes),
                hint="Do not use this repository unless you know who made it.",
            )
        digest, data = Digest(file), bytearray()

        def keep(piece: bytes) -> None:
            data.extend(piece)
            digest.update(piece)

        self._receive(file, digest, keep)
        if not digest.is_right:
            raise self._wrong(file, digest)
        return bytes(data)

    def fetch(self, file: RemoteFile, part: Path, *, on_bytes: OnBytes) -> str:
        """Fetch a file into a part file, from where it ends; return its SHA-256.

        A file that comes out wrong is fetched once more from its start: the fault may lie in
        bytes that were kept.

        Raises:
            HubError: it cannot be fetched; what is there stays.
            VerificationError: it is not what the repository lists; nothing of it stays.
            ResourceError: the disk does not take it.
            StoppedError: `stop` was set; what is there stays.
        """
        for last_try in (False, True):
            digest = self._fill(file, part, on_bytes)
            if digest.is_right:
                return digest.sha256
            with disk_errors(part, doing="write to the download folder"):
                part.unlink(missing_ok=True)
            if last_try:
                break
            on_bytes(-digest.nbytes)
            _log.warning("%s came out wrong; fetching it once more", self._where(file))
        raise self._wrong(file, digest)

    def _fill(self, file: RemoteFile, part: Path, on_bytes: OnBytes) -> Digest:
        doing = "write to the download folder"
        with disk_errors(part, doing=doing, nbytes=file.nbytes):
            part.parent.mkdir(parents=True, exist_ok=True)
            part.touch()
        digest = hash_file(part, file, stop=self.stop, whole_pieces=True)
        on_bytes(digest.nbytes)
        with disk_errors(part, doing=doing, nbytes=file.nbytes), part.open("r+b", 0) as out:
            out.truncate(digest.nbytes)
            out.seek(digest.nbytes)

            def write(piece: bytes) -> None:
                write_all(out.fileno(), memoryview(piece))
                digest.update(piece)
                on_bytes(len(piece))

            self._receive(file, digest, write)
        return digest

    def _receive(self, file: RemoteFile, digest: Digest, take: Callable[[bytes], None]) -> None:
        """Hand every byte that is still missing to `take`, however often the stream is cut."""
        policy, failures = self.remote.policy, 0
        while digest.nbytes < file.nbytes:
            before = digest.nbytes
            try:
                self._receive_once(file, digest, take)
            except NETWORK_ERRORS as error:
                # Only failures in a row count: a stream that gets on may be cut many times.
                failures = 1 if digest.nbytes > before else failures + 1
                if failures >= policy.attempts or not may_pass(error):
                    raise hub_error(error, what=self._where(file), failures=failures) from error
                if self.stop.wait(policy.wait_s(failures, retry_after_s(error))):
                    raise StoppedError from error

    def _receive_once(
        self, file: RemoteFile, digest: Digest, take: Callable[[bytes], None]
    ) -> None:
        start = digest.nbytes
        with self.remote.stream(self.snapshot, file, start=start) as response:
            if start and response.status_code == 200:
                raise HubError(
                    "the server does not send parts of files, so this one cannot go on",
                    where=self._where(file),
                    hint="Use another HF_ENDPOINT, or remove the .incomplete file to start anew.",
                )
            for piece in response.iter_raw():
                if self.stop.is_set():
                    raise StoppedError
                if digest.nbytes + len(piece) > file.nbytes:
                    raise VerificationError(
                        "file is longer than the repository lists",
                        where=self._where(file),
                        expected=sized(file.nbytes),
                        hint="Check HF_ENDPOINT and the proxy, and run again.",
                    )
                take(piece)

    def _where(self, file: RemoteFile) -> str:
        return f"{self.snapshot.name}: {file.path}"

    def _wrong(self, file: RemoteFile, digest: Digest) -> VerificationError:
        return VerificationError(
            "file is not what the repository lists: its hash differs",
            where=self._where(file),
            expected=f"SHA-256 {file.sha256}" if file.sha256 else f"git SHA-1 {file.git_sha1}",
            found=f"SHA-256 {digest.sha256}" if file.sha256 else "another",
            hint="What came was damaged on its way or in the store, and was removed. Run again; "
            "if it stays, use another HF_ENDPOINT or tell the owner of the repository.",
        )


def hash_file(
    path: Path, file: RemoteFile, *, stop: threading.Event, whole_pieces: bool = False
) -> Digest:
    """Return the hashes of what lies at `path`.

    Args:
        path: a plain file.
        file: what it should be.
        stop: ends the reading.
        whole_pieces: leave out what is behind the last whole piece, and behind the listed size.

    Raises:
        CheckpointError: not a plain file, or not readable.
        StoppedError: `stop` was set.
    """
    digest = Digest(file)
    with open_regular(path) as descriptor:
        size = path.stat().st_size
        if whole_pieces:
            size = 0 if size > file.nbytes else size // PIECE_BYTES * PIECE_BYTES
        buffer = memoryview(bytearray(min(size, _READ_BYTES)))
        for at in range(0, size, _READ_BYTES):
            if stop.is_set():
                raise StoppedError
            view = buffer[: min(_READ_BYTES, size - at)]
            read_into(descriptor, view, offset=at, path=path)
            digest.update(view)
    return digest
