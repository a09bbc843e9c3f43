"""Write all tensors of one file from chunks that another thread makes meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing

from kimi_convert.checkpoints.ahead import ahead
from kimi_convert.checkpoints.writer import ShardWriter

OnTensor = Callable[[str, int], None]  # told of each tensor: its name, and the bytes before it

_Piece = memoryview | None  # the next bytes of a tensor; None after its last


def ignore_tensor(name: str, done_bytes: int) -> None:
    """Take a tensor and do nothing."""


def write_tensors(
    writer: ShardWriter,
    tensors: Iterable[Iterable[memoryview]],
    *,
    on_tensor: OnTensor = ignore_tensor,
    beside: bool = True,
) -> None:
    """Write every tensor of a file.

    Args:
        writer: at its first tensor.
        tensors: for each in order its chunks, each the taker's to keep.
        on_tensor: told of each tensor before it.
        beside: whether chunks are made on a thread of their own. Where they wait for a network,
            only this thread can be interrupted.

    Raises:
        VerificationError: not exactly the planned number of bytes.
        ResourceError: the disk does not take them.
    """
    pieces = _flat(tensors)
    if beside:
        pieces = ahead(pieces, nbytes=_nbytes)
    done = 0
    with closing(pieces):
        for tensor in writer.shard.tensors:
            on_tensor(tensor.name, done)
            writer.write(tensor.name, _one_tensor(pieces))
            done += tensor.nbytes


def _flat(tensors: Iterable[Iterable[memoryview]]) -> Generator[_Piece]:
    for chunks in tensors:
        yield from chunks
        yield None


def _one_tensor(pieces: Iterator[_Piece]) -> Iterator[memoryview]:
    """Give the pieces up to the end of a tensor, holding none while the next is made."""
    while (piece := next(pieces)) is not None:
        yield piece
        del piece


def _nbytes(piece: _Piece) -> int:
    return 0 if piece is None else piece.nbytes
