"""What a finished file is known by, and whether a file still is what was written.

A small file has one hash. A file of weights has one of its header and one of each tensor: together
they cover every byte once, say which tensor differs, and can be taken on several threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kimi_convert.checkpoints.hashing import sha256_of_chunks
from kimi_convert.checkpoints.messages import quoted
from kimi_convert.checkpoints.regular_file import chunks_of, open_regular
from kimi_convert.checkpoints.safetensors_header import ShardHeader, TensorSpec, read_header

_THREADS = 2


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """One finished file that holds no weights."""

    name: str
    nbytes: int
    sha256: str  # hex

    def to_json(self) -> dict[str, object]:
        """Return what conversion.json says of it."""
        return {"sha256": self.sha256, "size": self.nbytes}


@dataclass(frozen=True, slots=True)
class WrittenShard:
    """One finished file of weights."""

    name: str
    nbytes: int
    header_sha256: str  # hex; of all bytes before the first tensor
    tensor_sha256: Mapping[str, str]  # name -> hex, in the order of the file

    def to_json(self) -> dict[str, object]:
        """Return what conversion.json says of it, beside the hashes of its tensors."""
        return {"header_sha256": self.header_sha256, "size": self.nbytes}


def tensor_hashes(files: Iterable[WrittenFile | WrittenShard]) -> dict[str, str]:
    """Return the SHA-256 of every tensor in these files, by name."""
    shards = (file for file in files if isinstance(file, WrittenShard))
    return {name: sha256 for shard in shards for name, sha256 in shard.tensor_sha256.items()}


def difference(path: Path, written: WrittenShard) -> str:
    """Read a file again; return in words how it is not as it was written, or "".

    Raises:
        CheckpointError: it is not a whole, valid safetensors file, or cannot be read.
    """
    header = read_header(path)
    if header.file_bytes != written.nbytes:
        return f"{header.file_bytes} bytes"
    if sha256_of_header(path, header) != written.header_sha256:
        return "another header"
    with ThreadPoolExecutor(_THREADS, "hash") as threads:
        digests = threads.map(partial(_sha256_of_tensor, path), header.tensors)
        for tensor, digest in zip(header.tensors, digests, strict=True):
            if digest != written.tensor_sha256[tensor.name]:
                threads.shutdown(cancel_futures=True)
                return f"other bytes of tensor {quoted(tensor.name)}"
    return ""


def sha256_of_header(path: Path, header: ShardHeader) -> str:
    """Return the SHA-256 of a file's bytes before its first tensor, in hex.

    Raises:
        CheckpointError: it cannot be read.
    """
    return _sha256(path, 0, min((one.start for one in header.tensors), default=header.file_bytes))


def _sha256_of_tensor(path: Path, tensor: TensorSpec) -> str:
    return _sha256(path, tensor.start, tensor.end)


def _sha256(path: Path, start: int, end: int) -> str:
    with open_regular(path) as descriptor:
        return sha256_of_chunks(chunks_of(descriptor, start, end, path=path))
