"""Typed, checked reading of one JSON object: every read is recorded, so what is left is unknown.

A field may have several spellings; when more than one is present they must agree. A missing
field without a default, a wrong type or a contradiction is a `ConfigError` that names the field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from kimi_convert.errors import ConfigError


class _Required:
    """Marks a field that has no default."""


REQUIRED = _Required()


class Fields:
    """Reads typed fields of `document` and remembers which keys it has read."""

    def __init__(self, document: Mapping[str, object], *, where: object, prefix: str = "") -> None:
        """Read from `document`, found at `where`; `prefix` is the path to a nested object."""
        self._document = document
        self._where = where
        self._prefix = prefix
        self._read: set[str] = set()

    def integer(self, *names: str, default: int | _Required = REQUIRED) -> int:
        """Return a whole number; null counts as missing."""
        value = self._value(names, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(names[0], "a whole number", value)
        return value

    def optional_integer(self, *names: str) -> int | None:
        """Return a whole number, or None where the field is null or missing."""
        value = self._value(names, None)
        if value is None:
            return None
        return self.integer(*names)

    def number(self, *names: str, default: float | _Required = REQUIRED) -> float:
        """Return a finite number as a float."""
        value = self._value(names, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(names[0], "a number", value)
        if value != value or value in (float("inf"), float("-inf")):
            raise self._wrong(names[0], "a finite number", value)
        return float(value)

    def boolean(self, *names: str, default: bool | _Required = REQUIRED) -> bool:
        """Return true or false."""
        value = self._value(names, default)
        if not isinstance(value, bool):
            raise self._wrong(names[0], "true or false", value)
        return value

    def text(self, *names: str, default: str | _Required = REQUIRED) -> str:
        """Return a string."""
        value = self._value(names, default)
        if not isinstance(value, str):
            raise self._wrong(names[0], "a string", value)
        return value

    def integers(self, *names: str) -> tuple[int, ...]:
        """Return a list of whole numbers; one number counts as a list of one, null as none."""
        value = self._value(names, None)
        if value is None:
            return ()
        items = cast("list[object]", value) if isinstance(value, list) else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) for item in items):
            raise self._wrong(names[0], "whole numbers", value)
        return tuple(cast("list[int]", items))

    def texts(self, name: str) -> tuple[str, ...] | None:
        """Return a list of strings, or None where the field is null or missing."""
        value = self._value((name,), None)
        if value is None:
            return None
        items = cast("list[object]", value) if isinstance(value, list) else []
        if not items or any(not isinstance(item, str) for item in items):
            raise self._wrong(name, "a list of strings", value)
        return tuple(cast("list[str]", items))

    def mapping(self, *names: str) -> Mapping[str, object] | None:
        """Return an object, or None where the field is null or missing."""
        value = self._value(names, None)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._wrong(names[0], "an object", value)
        return cast("dict[str, object]", value)

    def nested(self, name: str) -> Fields | None:
        """Return a reader of a nested object, or None where it is null or missing."""
        value = self.mapping(name)
        return None if value is None else Fields(value, where=self._where, prefix=f"{name}.")

    def raw(self, name: str) -> object:
        """Return a field of any type as it stands, or None where it is missing."""
        return self._value((name,), None)

    def expect(self, name: str, *allowed: object) -> None:
        """Require that a field, where present, has one of the allowed values; it stays carried."""
        value = self._document.get(name)
        if name in self._document and not any(_same(value, one) for one in allowed):
            raise self._wrong(name, " or ".join(repr(one) for one in allowed), value)

    def rest(self) -> dict[str, object]:
        """Return the fields that nothing has read, in their order."""
        return {key: value for key, value in self._document.items() if key not in self._read}

    def refuse_rest(self) -> None:
        """Require that every field was read."""
        for name, value in self.rest().items():
            raise ConfigError(
                f"config field {self._prefix}{name!r} is not known here and may change the maths",
                where=self._where,
                found=repr(value)[:80],
                hint="Use a version of kimi-convert that knows it, or remove it if it is inert.",
            )

    def _value(self, names: tuple[str, ...], default: object) -> object:
        self._read.update(names)
        present = {
            name: self._document[name] for name in names if self._document.get(name) is not None
        }
        if not present:
            if isinstance(default, _Required):
                raise ConfigError(
                    f"config field {self._prefix}{names[0]!r} is missing", where=self._where
                )
            return default
        (first, value), *others = present.items()
        for name, other in others:
            if not _same(other, value):
                raise ConfigError(
                    f"config fields {first!r} and {name!r} contradict each other",
                    where=self._where,
                    found=f"{value!r} and {other!r}",
                    hint="Both spell the same thing; remove the wrong one.",
                )
        return value

    def _wrong(self, name: str, expected: str, found: object) -> ConfigError:
        return ConfigError(
            f"config field {self._prefix}{name!r} is not valid",
            where=self._where,
            expected=expected,
            found=repr(found)[:80],
        )


def _same(left: object, right: object) -> bool:
    """Equality that keeps true apart from 1."""
    return left == right and isinstance(left, bool) == isinstance(right, bool)
