"""What a command shows, as data: facts, tables and sentences. How they look is `_output`'s."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Facts:
    """A title and labelled values."""

    title: str
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Table:
    """A title, column names and rows of as many cells."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: tuple[str, ...] = ()  # names of the columns that are aligned to the right


@dataclass(frozen=True, slots=True)
class Sentence:
    """One line of prose."""

    text: str
    warns: bool = False


@dataclass(frozen=True, slots=True)
class Heading:
    """The start of a part of a long report."""

    text: str


Section = Facts | Table | Sentence | Heading
Report = Sequence[Section]
