"""SHA-256 of files and of byte streams, in bounded memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from kimi_convert.checkpoints.regular_file import open_regular
from kimi_convert.errors import CheckpointError


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hex.

    Raises:
        CheckpointError: missing, not a plain file, or not readable.
    """
    try:
        with open_regular(path) as descriptor, open(descriptor, "rb", closefd=False) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError("file cannot be read", where=path, found=error.strerror) from error


def sha256_of_chunks(chunks: Iterable[bytes | bytearray | memoryview]) -> str:
    """Return the SHA-256 of the chunks' bytes, one after the other, in hex."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()
