"""What a small teacher is trained on: documents of files and folders, as one run of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from kimi_convert.errors import InputError
from kimi_convert.model.text import read_documents
from kimi_convert.model.tokenizer import Tokenizer

_SUFFIXES = frozenset((".py", ".rst", ".txt", ".md"))
_SHORTEST, _LONGEST = 500, 300_000  # bytes of a file in a folder
_MOST = 60_000_000  # characters in all: what follows is left out
_PROBED = 200  # characters by which a held-out document is recognised


def training_tokens(
    sources: Sequence[Path], held_out: Path, tokenizer: Tokenizer, *, separator_id: int
) -> torch.Tensor:
    """Return the tokens [n] int32 of all documents but those that are held out.

    Args:
        sources: `.jsonl` and `.txt` files, and folders, whose texts and Python code are read.
        held_out: a file whose documents, and whatever contains a piece of them, are left out.
        tokenizer: of the model.
        separator_id: put after every document.

    Raises:
        InputError: a source is not there or not understood, or nothing is left.
    """
    probes = [_middle(document.text or "") for document in read_documents(held_out)]
    seen: set[int] = set()
    parts: list[torch.Tensor] = []
    left = _MOST
    for text in _texts(sources):
        digest = hash(text)
        left -= len(text)
        if left < 0:
            break
        if digest in seen or any(probe in text for probe in probes):
            continue
        seen.add(digest)
        ids = [*tokenizer.encode(text), separator_id]
        parts.append(torch.tensor(ids, dtype=torch.int32))
    if not parts:
        raise InputError("there is nothing to train on", found=", ".join(map(str, sources)))
    return torch.cat(parts)


def _middle(text: str) -> str:
    start = max(0, (len(text) - _PROBED) // 2)
    return text[start : start + _PROBED]


def _texts(sources: Sequence[Path]) -> Iterator[str]:
    for source in sources:
        if not source.is_dir():
            yield from (document.text or "" for document in read_documents(source))
            continue
        for path in sorted(source.rglob("*")):
            if path.suffix in _SUFFIXES and path.is_file():
                data = path.read_bytes()
                if _SHORTEST <= len(data) <= _LONGEST:
                    yield data.decode("utf-8", errors="ignore")
