"""Lay out files so that tensors that are carried over can share the blocks of their source.

Blocks are shared where a tensor begins at the same place within a block in both files. The header of
a safetensors file may end in spaces, so the tensors of one file can be moved together: as far as
suits the most bytes. They keep their places within a block where those before them fill whole
blocks, so it may also pay to put the others last.

What comes out depends on plan and headers alone: a file system that shares nothing gets the same bytes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from kimi_convert.checkpoints.clone import BLOCK_BYTES, LEAST_BYTES, Shareable
from kimi_convert.checkpoints.dtypes import DTYPES
from kimi_convert.checkpoints.index import ShardFile
from kimi_convert.checkpoints.safetensors_header import (
    HEADER_MULTIPLE,
    MAX_HEADER_BYTES,
    TensorSpec,
)
from kimi_convert.checkpoints.shard_plan import PlannedShard, PlannedTensor, ShardPlan

_ENDS_BYTES = 2 * BLOCK_BYTES  # of a tensor, at most: blocks that hold others' bytes too
_WORTH_BYTES = 16 * 2**20  # for less, a file stays as it is


def share_layout(
    plan: ShardPlan, sources: Mapping[str, TensorSpec], max_shard_bytes: int
) -> ShardPlan:
    """Return a plan of the same files with the same tensors, in which more can be shared.

    Args:
        plan: what is to be written.
        sources: where the tensors lie that are carried over unchanged, by their new names.
        max_shard_bytes: of each file, its header included.
    """
    return ShardPlan(tuple(_arranged(shard, sources, max_shard_bytes) for shard in plan.shards))


def shared_bytes(shard: PlannedShard, sources: Mapping[str, TensorSpec]) -> int:
    """Return how many bytes of a file can be shared at least."""
    return _by_shift(shard.tensors, sources).get(shard.header_bytes % BLOCK_BYTES, 0)


def shareable(
    shards: Iterable[PlannedShard],
    copies: Mapping[str, TensorSpec],
    files: Mapping[str, ShardFile],
) -> Shareable:
    """Return what of these files need not take room; `files` are those of the source, by name."""
    used = {stored.shard for stored in copies.values() if stored.nbytes >= LEAST_BYTES}
    nbytes = sum(shared_bytes(shard, copies) for shard in shards)
    return Shareable(nbytes, tuple(files[name].path for name in sorted(used)))


def _arranged(
    shard: PlannedShard, sources: Mapping[str, TensorSpec], max_shard_bytes: int
) -> PlannedShard:
    limit = max(max_shard_bytes, shard.file_bytes)
    best, most = shard, shared_bytes(shard, sources) + _WORTH_BYTES
    for tensors in (shard.tensors, tuple(sorted(shard.tensors, key=_whole_blocks_first))):
        by_shift = _by_shift(tensors, sources)
        if max(by_shift.values(), default=0) <= most:
            continue
        ordered = shard.in_order(tensors)
        for shift, nbytes in by_shift.items():
            padded = _padded(ordered, shift)
            if nbytes > most and padded is not None and padded.file_bytes <= limit:
                best, most = padded, nbytes
    return best


def _padded(shard: PlannedShard, shift: int) -> PlannedShard | None:
    """Return a file whose header ends at this place in a block, or None where none may."""
    padding = (shift - shard.header_bytes) % BLOCK_BYTES
    header_bytes = shard.header_bytes + padding
    if padding % HEADER_MULTIPLE or header_bytes > MAX_HEADER_BYTES:
        return None
    return replace(shard, header_bytes=header_bytes)


def _by_shift(
    tensors: Sequence[PlannedTensor], sources: Mapping[str, TensorSpec]
) -> dict[int, int]:
    """Return, by the place in a block where a header would have to end, what could be shared."""
    found: dict[int, int] = defaultdict(int)
    at = 0
    for tensor in tensors:
        source = sources.get(tensor.name)
        if source is not None and tensor.nbytes >= LEAST_BYTES:
            found[(source.start - at) % BLOCK_BYTES] += tensor.nbytes - _ENDS_BYTES
        at += tensor.nbytes
    return found


def _whole_blocks_first(tensor: PlannedTensor) -> tuple[bool, int]:
    """Keep every tensor aligned to its dtype: after whole blocks, the widest come first."""
    return tensor.nbytes % BLOCK_BYTES != 0, -DTYPES[tensor.dtype].width_bytes
