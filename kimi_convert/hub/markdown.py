"""Values from files as plain Markdown: none can become markup, a link or a second cell."""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

# CommonMark takes a backslash before any ASCII punctuation; these need none.
_PLAIN = frozenset(string.ascii_letters + string.digits + " ,.;/-+=%()'")
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
_MAX_CELL = 200


def escaped(value: object) -> str:
    """Return a value as plain text of Markdown, on one line and of bounded length."""
    text = str(value)
    shown = "".join(char if char.isprintable() else " " for char in text[:_MAX_CELL])
    more = "..." if len(text) > _MAX_CELL else ""
    return "".join(map(_escaped_character, shown)) + more


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Give the lines of a table; cells are Markdown already."""
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def cell(fields: Mapping[str, object], key: str) -> str:
    """Return a field escaped, or a question mark if it is missing."""
    return escaped(fields.get(key, "?"))


def number(value: object, form: str) -> str:
    """Return a number in a form of `format`, or a dash for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return format(value, form) if is_number else "-"


def numbers(value: object) -> str:
    """Return a list of whole numbers; what else is in it is left out."""
    items = cast("list[object]", value) if isinstance(value, list) else []
    return escaped(", ".join(str(item) for item in items if type(item) is int))


def _escaped_character(char: str) -> str:
    if char in _PLAIN or not char.isascii():
        return char
    return _ENTITIES.get(char, f"\\{char}")
