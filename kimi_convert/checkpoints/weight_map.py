"""Which file of a folder holds which tensor, as `model.safetensors.index.json` says it.

The index is untrusted: a file name in it must be a plain name of a safetensors file, or a
hostile index could have any file of the machine read (or, on the Hub, any repository that the
user's token opens). Checked here, before any name becomes a path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from kimi_convert.checkpoints.messages import listed, quoted
from kimi_convert.checkpoints.safetensors_header import check_tensor_name
from kimi_convert.checkpoints.strict_json import as_object, parse_object
from kimi_convert.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SHARD_SUFFIX = ".safetensors"

_MAX_FILE_NAME_BYTES = 255
# Separators of both kinds, drives and streams of Windows, and URL escapes.
_FORBIDDEN = frozenset('/\\:%?#*"<>|')


@dataclass(frozen=True, slots=True)
class WeightMap:
    """The checked content of an index file."""

    shard_of: Mapping[str, str]  # tensor name -> file name
    total_size: int | None  # bytes of all tensors; None if absent or not a whole number

    @property
    def shards(self) -> list[str]:
        """File names, sorted, each once."""
        return sorted(set(self.shard_of.values()))


def parse_weight_map(text: bytes, *, where: object) -> WeightMap:
    """Parse and check the text of an index file.

    Raises:
        CheckpointError: not an index, or one that names something else than a plain file.
    """
    document = parse_object(text, where=where)
    shard_of = as_object(document.get("weight_map"))
    if not shard_of:
        raise CheckpointError(
            "index has no weight_map",
            where=where,
            expected="an object that gives a file name for every tensor",
            found=quoted(document.get("weight_map")),
            hint="Download the index again.",
        )
    for name in shard_of:
        check_tensor_name(name, where=where)
    interned: dict[str, str] = {}  # one string for each file, not for each tensor
    for shard in shard_of.values():
        if not (isinstance(shard, str) and shard in interned):
            interned[checked_shard_name(shard, where=where)] = cast("str", shard)
    checked = {name: interned[cast("str", shard)] for name, shard in shard_of.items()}
    return WeightMap(checked, _total_size(document))


def checked_shard_name(name: object, *, where: object) -> str:
    """Return a plain name of a safetensors file, or refuse it.

    Raises:
        CheckpointError: not a string, a path, hidden, escaped, unprintable, or of another kind.
    """
    if (
        not isinstance(name, str)
        or not name.endswith(SHARD_SUFFIX)
        or name.startswith(".")
        or not name.isprintable()
        or not _FORBIDDEN.isdisjoint(name)
        or len(name.encode("utf-8")) > _MAX_FILE_NAME_BYTES
    ):
        raise CheckpointError(
            "index names something that is not a plain file of this folder",
            where=where,
            expected=f"a file name that ends in {SHARD_SUFFIX}",
            found=quoted(name),
            hint="Do not use this checkpoint unless you know who made it.",
        )
    return name


def check_agreement(
    weight_map: WeightMap, found: Mapping[str, str], doubled: Mapping[str, str], *, where: object
) -> None:
    """Hold the index against the tensors that the files hold.

    Args:
        weight_map: what the index says.
        found: tensor name -> file that holds it.
        doubled: tensor name -> a second file that holds it.
        where: the index, for messages.

    Raises:
        CheckpointError: a tensor is missing from its file, in a file but not in the index, or
            in two files. All are counted, the first few named.
    """
    shard_of = weight_map.shard_of
    missing = [name for name, shard in shard_of.items() if found.get(name) != shard]
    extra = [name for name in found if name not in shard_of]
    problems = (
        (
            "tensors are in two files",
            [f"{name} ({found[name]}, {doubled[name]})" for name in doubled],
        ),
        ("tensors are not in the file that the index names", missing),
        ("tensors are in a file but not in the index", extra),
    )
    for message, names in problems:
        if names:
            raise CheckpointError(
                f"{len(names)} {message}",
                where=where,
                found=listed(names),
                hint="Index and files belong to different checkpoints; download them again.",
            )


def _total_size(document: Mapping[str, object]) -> int | None:
    value = (as_object(document.get("metadata")) or {}).get("total_size")
    return value if isinstance(value, int) and not isinstance(value, bool) else None
