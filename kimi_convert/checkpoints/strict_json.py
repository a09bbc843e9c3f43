"""JSON from an untrusted file: one object, bounded, no duplicate keys, no NaN.

The bounds keep a hostile file from filling memory. They lie far above real checkpoints:
Kimi-K2 has 139,644 tensors and an index of about 15 MB.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import cast

from kimi_convert.checkpoints.file_kinds import recognise
from kimi_convert.checkpoints.messages import quoted
from kimi_convert.errors import CheckpointError

# The limit of the safetensors library for a header; used for the index too.
MAX_JSON_BYTES = 100_000_000

# Each value costs up to some 250 bytes as a Python object, whatever its length in the file.
# A tensor takes 5 to 8 commas in a header and one in an index.
_MAX_COMMAS = 2_000_000


def parse_object(data: bytes, *, where: object) -> dict[str, object]:
    """Parse UTF-8 JSON that must be one object.

    Raises:
        CheckpointError: too large, not UTF-8, not JSON, not an object, a key given twice,
            NaN or Infinity, or nested too deeply.
    """
    if len(data) > MAX_JSON_BYTES:
        raise CheckpointError(
            "JSON is too large",
            where=where,
            expected=f"at most {MAX_JSON_BYTES} bytes",
            found=f"{len(data)} bytes",
        )
    commas = data.count(b",")
    if commas > _MAX_COMMAS:
        raise CheckpointError(
            "JSON holds too many values",
            where=where,
            expected=f"at most {_MAX_COMMAS} commas",
            found=commas,
        )
    try:
        # Decoded here: given bytes, json.loads would also take UTF-16 and UTF-32.
        document: object = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:
        kind = recognise(data)
        raise CheckpointError(
            "not valid JSON",
            where=where,
            expected="one JSON object in UTF-8",
            found=kind.title if kind else str(error),
            hint=kind.hint if kind else "The file is damaged; download it again.",
        ) from error
    found = as_object(document)
    if found is None:
        raise CheckpointError(
            "not a JSON object", where=where, found=f"a {type(document).__name__}"
        )
    return found


def as_object(value: object) -> dict[str, object] | None:
    """Return a parsed value if it is a JSON object, else None."""
    return cast("dict[str, object]", value) if isinstance(value, dict) else None


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"the key {quoted(twice)} is given twice")
    return found


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")
