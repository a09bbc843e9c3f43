"""A checkpoint on the Hub as a folder of headers: everything but the weights, in a few requests.

Each file of weights becomes a sparse file of its true size that holds its header alone. So the
code that reads headers from a folder, and checks that they cover their files, reads these. No
tensor may be read from it; the folder is temporary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from kimi_convert.checkpoints.disk import disk_errors
from kimi_convert.checkpoints.safetensors_header import LENGTH_BYTES, parse_length
from kimi_convert.checkpoints.weight_map import INDEX_FILE
from kimi_convert.config.huggingface import CONFIG_FILE
from kimi_convert.hub.failures import call
from kimi_convert.hub.listing import RemoteFile
from kimi_convert.hub.remote import Remote, Snapshot
from kimi_convert.hub.selection import shard_files
from kimi_convert.hub.transfer import Transfer

# Moonlight's headers have 50 to 150 kB, Kimi-K2's up to 400 kB: one request for most.
_FIRST_BYTES = 1 << 17
_REQUESTS_AT_A_TIME = 8


@contextmanager
def folder_of_headers(remote: Remote, snapshot: Snapshot) -> Generator[Path]:
    """Give a temporary folder with config.json, the index and the headers of a snapshot.

    Raises:
        HubError: something cannot be fetched.
        CheckpointError: the index or a header is not valid, or names what is not there.
        ResourceError: the temporary folder cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="kimi-convert-") as name:
        folder = Path(name)
        with disk_errors(folder, doing="write to the temporary folder"):
            write_headers(remote, snapshot, folder)
        yield folder


def write_headers(remote: Remote, snapshot: Snapshot, folder: Path) -> list[RemoteFile]:
    """Write config.json, the index and a sparse file for each file of weights; return these."""
    transfer = Transfer(remote, snapshot)
    contents: dict[str, bytes] = {}

    def read(file: RemoteFile) -> bytes:
        contents[file.path] = transfer.read(file)
        return contents[file.path]

    shards = [snapshot.files[path] for path in shard_files(snapshot, read)]
    if CONFIG_FILE in snapshot.files:
        read(snapshot.files[CONFIG_FILE])
    for path in (CONFIG_FILE, INDEX_FILE):
        if path in contents:
            (folder / path).write_bytes(contents[path])
    with ThreadPoolExecutor(_REQUESTS_AT_A_TIME) as pool:
        headers = pool.map(partial(_header, remote, snapshot), shards)
        for file, header in zip(shards, headers, strict=True):
            with (folder / file.path).open("wb") as sparse:
                sparse.write(header)
                sparse.truncate(file.nbytes)
    return shards


def _header(remote: Remote, snapshot: Snapshot, file: RemoteFile) -> bytes:
    """Return the first bytes of a file, its header among them; what it means is not checked."""
    start = _range(remote, snapshot, file, 0, min(_FIRST_BYTES, file.nbytes))
    where = f"{snapshot.name}: {file.path}"
    stop = LENGTH_BYTES + parse_length(start, file_bytes=file.nbytes, where=where)
    if stop <= len(start):
        return start[:stop]
    return start + _range(remote, snapshot, file, len(start), stop)


def _range(remote: Remote, snapshot: Snapshot, file: RemoteFile, start: int, stop: int) -> bytes:
    def ask() -> bytes:
        data = bytearray()
        with remote.stream(snapshot, file, start=start, stop=stop) as response:
            for piece in response.iter_raw():
                data.extend(piece)
                if len(data) >= stop - start:
                    break  # a server that does not know ranges sends on
        return bytes(data[: stop - start])

    return call(ask, what=f"{snapshot.name}: {file.path}", policy=remote.policy)
