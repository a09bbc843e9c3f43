"""The header of a safetensors file: read from bytes that nobody vouches for, and written.

    8 bytes   N, the length of the header, little endian
    N bytes   {"__metadata__": {str: str}, name: {"dtype", "shape", "data_offsets"}, ...} + spaces
    the rest  the tensors, back to back

`parse_header` needs the first bytes of a file and its size, not the file. Everything it returns
is checked: names, dtypes, shapes, and that the tensors cover the file exactly once. Stricter
than the safetensors library, which also takes duplicate keys, unknown fields and odd names.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard, cast

from kimi_convert.checkpoints.dtypes import DTYPES
from kimi_convert.checkpoints.file_kinds import SNIFF_BYTES, recognise
from kimi_convert.checkpoints.messages import quoted, sized
from kimi_convert.checkpoints.regular_file import open_regular, read_exactly
from kimi_convert.checkpoints.strict_json import MAX_JSON_BYTES, as_object, parse_object
from kimi_convert.errors import CheckpointError

LENGTH_BYTES = 8
HEADER_MULTIPLE = 8
MAX_HEADER_BYTES = MAX_JSON_BYTES

_METADATA_KEY = "__metadata__"
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_MAX_NAME_CHARACTERS = 512
_MAX_RANK = 64
_MAX_INTEGER = 2**63 - 1
_CUT_OFF = "The file is cut off; download it again."
_DAMAGED = "The file is damaged or of another kind; download it again."


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One stored tensor: what it is and where its bytes lie."""

    name: str
    dtype: str  # safetensors name, a key of DTYPES
    shape: tuple[int, ...]
    shard: str  # file name
    start: int  # bytes from the start of the file
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """What one file says about itself."""

    tensors: tuple[TensorSpec, ...]  # in the order of their bytes
    metadata: Mapping[str, str]
    file_bytes: int
    mtime_ns: int  # when the header was read
    ctime_ns: int


def read_header(path: Path) -> ShardHeader:
    """Read and check the header of a file, and nothing else of it.

    Raises:
        CheckpointError: the file is not a whole, valid safetensors file.
    """
    with open_regular(path) as descriptor:
        status = os.fstat(descriptor)
        size = status.st_size
        start = read_exactly(descriptor, min(size, SNIFF_BYTES), offset=0, path=path)
        header_bytes = parse_length(start, file_bytes=size, where=path)
        text = read_exactly(descriptor, header_bytes, offset=LENGTH_BYTES, path=path)
    tensors, metadata = parse_header(text, shard=path.name, file_bytes=size, where=path)
    return ShardHeader(tensors, metadata, size, status.st_mtime_ns, status.st_ctime_ns)


def parse_length(start: bytes, *, file_bytes: int, where: object) -> int:
    """Return the length of the header's JSON from the first bytes of a file.

    Args:
        start: the first `SNIFF_BYTES` bytes, or the whole file if it is shorter.
        file_bytes: the size of the file.
        where: the file, for messages.

    Raises:
        CheckpointError: empty, cut off, or not a safetensors file; says what it is instead.
    """
    if file_bytes == 0:
        raise CheckpointError("file is empty", where=where, found="0 bytes", hint=_CUT_OFF)
    header_bytes = int.from_bytes(start[:LENGTH_BYTES], "little")
    opening = start[LENGTH_BYTES : LENGTH_BYTES + 1]
    plausible = len(start) >= LENGTH_BYTES and 2 <= header_bytes <= MAX_HEADER_BYTES
    if not plausible or opening not in (b"{", b""):
        raise _not_safetensors(start, where)
    if header_bytes > file_bytes - LENGTH_BYTES:
        raise _truncated(LENGTH_BYTES + header_bytes, file_bytes, where, at_least=True)
    return header_bytes


def parse_header(
    text: bytes, *, shard: str, file_bytes: int, where: object
) -> tuple[tuple[TensorSpec, ...], dict[str, str]]:
    """Parse and check the JSON of a header.

    Args:
        text: the header without its length.
        shard: the file name that the tensors are to carry.
        file_bytes: the size of the file.
        where: the file, for messages.

    Returns:
        The tensors in the order of their bytes, and the metadata.

    Raises:
        CheckpointError: anything that is not exactly as the format says.
    """
    document = parse_object(text, where=where)
    metadata = _parse_metadata(document.pop(_METADATA_KEY, {}), where)
    data_start = LENGTH_BYTES + len(text)
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}  # few differ: share them
    tensors: list[TensorSpec] = []
    for name, entry in document.items():
        dtype, shape, (begin, end) = _parse_entry(name, entry, where)
        shape = shapes.setdefault(shape, shape)
        spec = TensorSpec(name, dtype, shape, shard, data_start + begin, data_start + end)
        tensors.append(spec)
    tensors.sort(key=_by_place)
    _check_cover(tensors, data_start, file_bytes, where)
    return tuple(tensors), metadata


def encode_entry(name: str, *, dtype: str, shape: Sequence[int], start: int, end: int) -> bytes:
    """Return one entry of a header; offsets count from the end of the header."""
    text = (
        f'{json.dumps(name, ensure_ascii=False)}:{{"dtype":"{dtype}",'
        f'"shape":[{",".join(map(str, shape))}],"data_offsets":[{start},{end}]}}'
    )
    return text.encode("utf-8")


def encode_header(
    entries: Iterable[bytes], *, metadata: Mapping[str, str], nbytes: int = 0
) -> bytes:
    """Return the length and the JSON, with spaces up to a multiple of 8 bytes, at least `nbytes`."""
    first = json.dumps({_METADATA_KEY: dict(metadata)}, ensure_ascii=False, separators=(",", ":"))
    text = b",".join((first.encode("utf-8")[1:-1], *entries))
    length = max(padded_header_bytes(len(text)), nbytes) - LENGTH_BYTES
    return length.to_bytes(LENGTH_BYTES, "little") + (b"{" + text + b"}").ljust(length)


def padded_header_bytes(entries_bytes: int) -> int:
    """Return the size of a header on disk from that of its JSON without the braces."""
    return LENGTH_BYTES + -(-(entries_bytes + 2) // HEADER_MULTIPLE) * HEADER_MULTIPLE


def check_tensor_name(name: str, *, where: object) -> None:
    """Refuse names that are empty, long, unprintable, reserved or look like a path upwards.

    Nothing here makes a path of a name; others who read the same names might.

    Raises:
        CheckpointError: the name is one of these.
    """
    parts = name.replace("\\", "/").split("/") if "/" in name or "\\" in name else ()
    if (
        not 0 < len(name) <= _MAX_NAME_CHARACTERS
        or not name.isprintable()
        or ".." in parts
        or name == _METADATA_KEY
    ):
        raise CheckpointError(
            "tensor name is not acceptable",
            where=where,
            expected=f"1 to {_MAX_NAME_CHARACTERS} printable characters, no '..' between slashes",
            found=quoted(name),
        )


def _parse_metadata(value: object, where: object) -> dict[str, str]:
    metadata = as_object(value)
    if metadata is None:
        raise CheckpointError("metadata is not an object", where=where, found=quoted(value))
    for key, text in metadata.items():
        if not isinstance(text, str):
            raise CheckpointError(
                f"metadata {quoted(key)} is not a string", where=where, found=quoted(text)
            )
    return cast("dict[str, str]", metadata)


def _parse_entry(
    name: str, entry: object, where: object
) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """Return the dtype, the shape and the offsets from the end of the header."""
    check_tensor_name(name, where=where)
    fields = as_object(entry)
    if fields is None or fields.keys() != _ENTRY_KEYS:
        expected = "the fields dtype, shape and data_offsets"
        raise _bad_entry(name, where, expected=expected, found=quoted(entry))
    dtype_name, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    dtype = DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        expected = f"one of the dtypes {', '.join(DTYPES)}"
        raise _bad_entry(name, where, expected=expected, found=quoted(dtype_name))
    if not _is_sizes(shape) or len(shape) > _MAX_RANK:
        expected = f"a shape of up to {_MAX_RANK} whole numbers"
        raise _bad_entry(name, where, expected=expected, found=quoted(shape))
    if not _is_sizes(offsets) or len(offsets) != 2:
        expected = "data_offsets [begin, end]"
        raise _bad_entry(name, where, expected=expected, found=quoted(offsets))
    begin, end = offsets
    nbytes = math.prod(shape) * dtype.width_bytes
    if end - begin != nbytes:
        expected = f"{nbytes} bytes for {dtype.name} {shape}"
        raise _bad_entry(name, where, expected=expected, found=f"{end - begin} bytes")
    return dtype.name, tuple(shape), (begin, end)


def _is_sizes(value: object) -> TypeGuard[list[int]]:
    """Tell a list of whole numbers >= 0 that fit in 63 bits; true and 1.0 are not numbers."""
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item <= _MAX_INTEGER for item in cast("list[object]", value)
    )


def _by_place(tensor: TensorSpec) -> tuple[int, int]:
    return tensor.start, tensor.end


def _check_cover(
    tensors: Sequence[TensorSpec], data_start: int, file_bytes: int, where: object
) -> None:
    """Check that the tensors fill the file from the header to its end, each byte once."""
    at = data_start
    for tensor in tensors:
        if tensor.start != at:
            raise CheckpointError(
                "tensors overlap" if tensor.start < at else "bytes between tensors belong to none",
                where=where,
                expected=f"{quoted(tensor.name)} to start at byte {at}, where the one before ends",
                found=f"byte {tensor.start}",
                hint=_DAMAGED,
            )
        at = tensor.end
    if at > file_bytes:
        raise _truncated(at, file_bytes, where, at_least=False)
    if at < file_bytes:
        raise CheckpointError(
            "file is longer than its tensors",
            where=where,
            expected=sized(at),
            found=sized(file_bytes),
            hint=_DAMAGED,
        )


def _bad_entry(name: str, where: object, *, expected: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"header entry of tensor {quoted(name)} is not valid",
        where=where,
        expected=expected,
        found=found,
        hint=_DAMAGED,
    )


def _truncated(expected: int, found: int, where: object, *, at_least: bool) -> CheckpointError:
    return CheckpointError(
        "file is cut off",
        where=where,
        expected=f"{'at least ' if at_least else ''}{sized(expected)}",
        found=sized(found),
        hint=_CUT_OFF,
    )


def _not_safetensors(start: bytes, where: object) -> CheckpointError:
    kind = recognise(start)
    return CheckpointError(
        "not a safetensors file",
        where=where,
        found=kind.title if kind else f"a file that starts with {quoted(start[:16])}",
        hint=kind.hint if kind else _DAMAGED,
    )
