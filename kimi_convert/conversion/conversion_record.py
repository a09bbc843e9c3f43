"""conversion.json of a checkpoint that was written anew: the conversion's record, and what came after.

The record of the conversion stays as it is, the hashes of its files and tensors included. What an
export or an alignment did, and the hashes of the folder that it wrote, are under "export".
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

from kimi_convert import __version__
from kimi_convert.checkpoints.regular_file import open_regular, read_exactly
from kimi_convert.checkpoints.strict_json import MAX_JSON_BYTES, as_object, parse_object
from kimi_convert.checkpoints.written import WrittenFile, WrittenShard, tensor_hashes

CONVERSION_FILE = "conversion.json"

_HASHES = ("files", "tensors")


def read_conversion_record(folder: Path) -> dict[str, object] | None:
    """Return the content of conversion.json, or None where there is no such file.

    Raises:
        CheckpointError: it is not a JSON object, is too large or cannot be read.
    """
    path = folder / CONVERSION_FILE
    if not path.exists():
        return None
    with open_regular(path) as descriptor:
        # One byte more than is parsed, so that a file that is too large is seen as that.
        nbytes = min(os.fstat(descriptor).st_size, MAX_JSON_BYTES + 1)
        return parse_object(read_exactly(descriptor, nbytes, offset=0, path=path), where=path)


def extend_conversion_record(
    record: Mapping[str, object],
    files: Iterable[WrittenFile | WrittenShard],
    *,
    changes: Mapping[str, object],
) -> dict[str, object]:
    """Return a record with an "export" that holds `changes` and the hashes of all files.

    Of an export before this one, what it changed is kept in a list; its hashes are not, since
    they belong to files that are not here.
    """
    written = list(files)
    before = as_object(record.get("export"))
    export: dict[str, object] = {
        "format": 2,
        "tool": {"name": "kimi-convert", "version": __version__},
        **changes,
        "earlier": [] if before is None else _history(before),
        "files": {file.name: file.to_json() for file in written},
        "tensors": {name: {"sha256": digest} for name, digest in tensor_hashes(written).items()},
    }
    return {**record, "export": export}


def _history(export: Mapping[str, object]) -> list[object]:
    earlier = export.get("earlier")
    steps = cast("list[object]", earlier) if isinstance(earlier, list) else []
    own = {key: value for key, value in export.items() if key not in (*_HASHES, "earlier")}
    return [*steps, own]
