"""What the two kinds of tokenizer files have in common: an encoder, and the bytes of every token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()


@dataclass(frozen=True, slots=True)
class Codec:
    """A vocabulary over bytes."""

    encode: Callable[[str], list[int]]  # of well-formed text; adds no special tokens
    token_bytes: Mapping[int, bytes]  # by id; special tokens as the UTF-8 of their names
    special_ids: Mapping[str, int]  # by name


def well_formed(text: str) -> str:
    """Return text that UTF-8 can hold: surrogate pairs joined, lone surrogates as U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
