"""Read documents from a file, and pack them into the rows of tokens that models are measured on.

Both are streams: one document is held at a time, and reading stops when enough rows are full.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from kimi_convert.checkpoints.file_kinds import recognise
from kimi_convert.checkpoints.messages import sized
from kimi_convert.errors import InputError, TooLittleTextError, UsageError
from kimi_convert.model.document import Document, parse_document
from kimi_convert.model.tokenizer import Tokenizer

_MAX_DOCUMENT_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedText:
    """Rows of tokens; row n and the next row of its kind share one token.

    Inputs are `tokens[:, :-1]` and targets `tokens[:, 1:]`: every token of a kind is a target
    once, but for its first.
    """

    tokens: torch.Tensor  # [N, T + 1] int64
    kinds: tuple[str, ...]  # N, of each row
    left_over: Mapping[str, int]  # tokens that were read and are in no row, by kind

    def __post_init__(self) -> None:
        """Refuse rows without a kind."""
        assert len(self.kinds) == len(self.tokens)


def read_documents(path: Path) -> Iterator[Document]:
    """Read the documents of a file.

    Args:
        path: `.jsonl` with one object per line, which has "text" or "token_ids" (or "ids") and
            may have "kind"; or `.txt`, UTF-8, which is one document.

    Raises:
        InputError: at once if there is no such file or it is of another type; while reading if
            it holds no documents, or a line is not valid or longer than 64 MiB.
    """
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise InputError(
            "texts of this type are not read",
            where=path,
            expected=" or ".join(_READERS),
            found=path.suffix or "no suffix",
            hint='Write one JSON object with a "text" per line, or plain text.',
        )
    if not path.is_file():
        raise InputError("there is no such file", where=path)
    return read(path)


def pack_documents(
    documents: Iterable[Document],
    tokenizer: Tokenizer | None,
    *,
    sequence_length: int,
    separator_id: int | None,
    vocab_size: int | None = None,
    max_tokens: int | None = None,
    max_tokens_per_kind: int | None = None,
) -> PackedText:
    """Join the documents of each kind and cut them into rows, in the order they become full.

    Args:
        documents: read no further than the limits need.
        tokenizer: encodes texts; None where all documents are token ids.
        sequence_length: T, input tokens per row.
        separator_id: put between documents of a kind; None for nothing.
        vocab_size: what ids must be below; None for the tokenizer's.
        max_tokens: at most so many input tokens in all rows; a part of a row is not made.
        max_tokens_per_kind: the same for the rows of each kind.

    Raises:
        UsageError: sequence length, separator or limits make no sense.
        InputError: an id is out of range, a text comes without a tokenizer, or there is not
            enough text for one row.
    """
    if vocab_size is None:
        if tokenizer is None:
            raise UsageError("packing needs a tokenizer or the vocabulary's size")
        vocab_size = tokenizer.vocab_size
    if separator_id is not None and not 0 <= separator_id < vocab_size:
        raise UsageError(
            "separator is not a token", expected=f"0 to {vocab_size - 1}", found=separator_id
        )
    packer = _Packer(
        sequence_length,
        max_rows=_rows_within(max_tokens, sequence_length),
        max_rows_per_kind=_rows_within(max_tokens_per_kind, sequence_length),
    )
    for document in documents:
        if packer.room(document.kind) > 0:
            ids = _token_ids(document, tokenizer, vocab_size=vocab_size)
            packer.add(document.kind, ids, separator_id=separator_id)
        if packer.is_full:
            break
    return packer.packed()


class _Packer:
    """Collects the tokens of each kind until they fill rows."""

    def __init__(self, sequence_length: int, *, max_rows: int, max_rows_per_kind: int) -> None:
        self._length = sequence_length
        self._max_rows = max_rows
        self._max_rows_per_kind = max_rows_per_kind
        self._rows: list[torch.Tensor] = []
        self._kinds: list[str] = []
        self._rows_of: Counter[str] = Counter()
        self._pending: dict[str, list[int]] = {}  # from the token shared with the last row on

    @property
    def is_full(self) -> bool:
        """Whether no kind can have another row."""
        return len(self._rows) >= self._max_rows

    def room(self, kind: str) -> int:
        """Return how many more rows of a kind are wanted."""
        in_all = self._max_rows - len(self._rows)
        return min(in_all, self._max_rows_per_kind - self._rows_of[kind])

    def add(self, kind: str, ids: Sequence[int], *, separator_id: int | None) -> None:
        """Append a document to its kind and cut off the rows that are full."""
        follows = kind in self._pending
        pending = self._pending.setdefault(kind, [])
        if follows and separator_id is not None:
            pending.append(separator_id)
        pending.extend(ids)
        length = self._length
        count = max(0, min((len(pending) - 1) // length, self.room(kind)))
        for start in range(0, count * length, length):
            row = pending[start : start + length + 1]
            self._rows.append(torch.tensor(row, dtype=torch.int64))
        self._kinds.extend([kind] * count)
        self._rows_of[kind] += count
        del pending[: count * length]

    def packed(self) -> PackedText:
        """Return the rows; at least one."""
        left_over = {
            kind: len(pending) - (1 if self._rows_of[kind] else 0)
            for kind, pending in self._pending.items()
        }
        if not self._rows:
            raise TooLittleTextError(
                "there is not enough text for one row",
                expected=f"at least {self._length + 1} tokens of one kind",
                found=f"at most {max(left_over.values(), default=0)} tokens",
                hint="Give a longer text, or use shorter sequences.",
            )
        return PackedText(
            tokens=torch.stack(self._rows), kinds=tuple(self._kinds), left_over=left_over
        )


def _rows_within(max_tokens: int | None, sequence_length: int) -> int:
    """Return how many rows a limit allows."""
    if sequence_length < 1:
        raise UsageError(
            "sequence length is not valid", expected="at least 1", found=sequence_length
        )
    if max_tokens is None:
        return sys.maxsize
    if max_tokens < sequence_length:
        raise UsageError(
            "the limit of tokens leaves no room for one row",
            expected=f"at least the sequence length, {sequence_length}",
            found=max_tokens,
        )
    return max_tokens // sequence_length


def _token_ids(
    document: Document, tokenizer: Tokenizer | None, *, vocab_size: int
) -> Sequence[int]:
    ids = document.token_ids
    if ids is None:
        if tokenizer is None:
            raise InputError(
                "a text needs a tokenizer, and there is none",
                where=document.where,
                hint="Give token ids, or put the tokenizer's files into the checkpoint's folder.",
            )
        assert document.text is not None
        ids = tokenizer.encode(document.text)
    outside = next((token_id for token_id in ids if not 0 <= token_id < vocab_size), None)
    if outside is not None:
        raise InputError(
            "a token id is out of range",
            where=document.where,
            expected=f"0 to {vocab_size - 1}",
            found=outside,
            hint="The ids must come from the tokenizer of this model.",
        )
    return ids


def _read_plain_text(path: Path) -> Generator[Document]:
    with _opened(path) as file:
        data = _bounded(file.read(_MAX_DOCUMENT_BYTES + 1), where=str(path))
    if not data.strip():
        raise _no_documents(path)
    yield Document(text=_decoded(data, where=str(path)), where=str(path))


def _read_json_lines(path: Path) -> Generator[Document]:
    empty = True
    with _opened(path) as file:
        for number in itertools.count(1):
            where = f"{path}:{number}"
            line = _bounded(file.readline(_MAX_DOCUMENT_BYTES + 1), where=where)
            if not line:
                break
            if not line.isspace():
                empty = False
                yield parse_document(_decoded(line, where=where), where=where)
    if empty:
        raise _no_documents(path)


def _no_documents(path: Path) -> InputError:
    return InputError("the file holds no documents", where=path)


_READERS: Mapping[str, Callable[[Path], Iterator[Document]]] = {
    ".jsonl": _read_json_lines,
    ".txt": _read_plain_text,
}


@contextmanager
def _opened(path: Path) -> Generator[BinaryIO]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError("the file cannot be read", where=path, found=error.strerror) from error
    with file:
        yield file


def _bounded(data: bytes, *, where: str) -> bytes:
    if len(data) > _MAX_DOCUMENT_BYTES:
        raise InputError(
            "a document is too long",
            where=where,
            expected=f"at most {sized(_MAX_DOCUMENT_BYTES)}",
            hint="Split it into several documents, one JSON object per line.",
        )
    return data


def _decoded(data: bytes, *, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        kind = recognise(data)
        raise InputError(
            "the text is not UTF-8",
            where=where,
            found=kind.title if kind else str(error),
            hint=kind.hint if kind else "Convert the file to UTF-8.",
        ) from error
