"""One document, and how it is written as one line of JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import cast

from kimi_convert.checkpoints.file_kinds import recognise
from kimi_convert.checkpoints.messages import quoted
from kimi_convert.checkpoints.strict_json import as_object
from kimi_convert.errors import InputError

_DEFAULT_KIND = "text"
_ID_FIELDS = ("token_ids", "ids")


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text, or one sequence of token ids: exactly one of the two is there."""

    kind: str = _DEFAULT_KIND  # what it is measured with: rows never mix kinds
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    where: str = ""  # file and line, for error messages

    def __post_init__(self) -> None:
        """Refuse neither and both."""
        assert (self.text is None) != (self.token_ids is None)


def parse_document(line: str, *, where: str) -> Document:
    """Parse an object with "text", "token_ids" or "ids", and maybe "kind"; the rest is ignored.

    Raises:
        InputError: it is not such an object; the message names `where`.
    """
    try:
        fields = as_object(json.loads(line))
    except (ValueError, RecursionError) as error:
        kind = recognise(line.encode())
        raise InputError(
            "a line is not valid JSON",
            where=where,
            found=kind.title if kind else str(error),
            hint=kind.hint if kind else "Every line must be one JSON object.",
        ) from error
    if fields is None:
        raise InputError("a line is not a JSON object", where=where, found=quoted(line))
    given = [name for name in ("text", *_ID_FIELDS) if name in fields]
    if len(given) != 1:
        raise InputError(
            "a line must have one text or one list of token ids",
            where=where,
            expected='"text", "token_ids" or "ids"',
            found=", ".join(given) or "none of them",
        )
    kind, content = fields.get("kind", _DEFAULT_KIND), fields[given[0]]
    if not isinstance(kind, str):
        raise _wrong_field("kind", "a string", kind, where=where)
    if given[0] in _ID_FIELDS:
        return Document(kind=kind, token_ids=_as_ids(given[0], content, where=where), where=where)
    if not isinstance(content, str):
        raise _wrong_field("text", "a string", content, where=where)
    return Document(kind=kind, text=content, where=where)


def _as_ids(name: str, value: object, *, where: str) -> tuple[int, ...]:
    items = cast("list[object]", value) if isinstance(value, list) else None
    # Not isinstance: true and false are whole numbers to Python.
    if items is None or any(type(item) is not int for item in items):
        raise _wrong_field(name, "a list of whole numbers", value, where=where)
    return tuple(cast("list[int]", items))


def _wrong_field(name: str, expected: str, found: object, *, where: str) -> InputError:
    return InputError(
        f'field "{name}" is not valid', where=where, expected=expected, found=quoted(found)
    )
