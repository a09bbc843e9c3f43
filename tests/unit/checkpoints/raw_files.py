"""Safetensors files and checkpoint folders, good and bad, built byte by byte for tests.

Independent of the package's own encoder.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

INDEX = "model.safetensors.index.json"


def raw_file(header, data=b"", *, declared=None):
    """Return a file of a header (an object, or its text as bytes) and the bytes after it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if declared is None else declared) + text + data


def entry(dtype="U8", shape=(4,), begin=0, end=4):
    """Return one entry of a header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def shard_of_bytes(tensors):
    """Return a file of U8 tensors, name -> bytes."""
    header, data = {}, b""
    for name, content in tensors.items():
        header[name] = entry("U8", [len(content)], len(data), len(data) + len(content))
        data += content
    return raw_file(header, data)


def write_checkpoint(folder: Path, shards, *, index=None):
    """Write file name -> {tensor: bytes}, and an index (made from the files, or as given)."""
    folder.mkdir(parents=True, exist_ok=True)
    for file_name, tensors in shards.items():
        (folder / file_name).write_bytes(shard_of_bytes(tensors))
    if index is None:
        weight_map = {name: file for file, tensors in shards.items() for name in tensors}
        index = {"metadata": {}, "weight_map": weight_map}
    text = index if isinstance(index, bytes) else json.dumps(index).encode()
    (folder / INDEX).write_bytes(text)
    return folder


def names_in(folder):
    """Return the names in a folder, sorted."""
    return sorted(path.name for path in Path(folder).iterdir())


def open_descriptors():
    """Return how many files this process holds open."""
    return len(names_in("/proc/self/fd"))
