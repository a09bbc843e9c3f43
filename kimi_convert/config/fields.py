"""Typed, checked reading of one JSON object: every read is recorded, so what is left is unknown.

A field may have several spellings; when more than one is present they must agree. A missing
field without a default, a wrong type or a contradiction is a `ConfigError` that names the field.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import cast

from kimi_convert.config.limits import MAX_INTEGER, shown
from kimi_convert.errors import ConfigError


class _Required:
    """Marks a field that has no default."""


REQUIRED = _Required()


class Fields:
    """Reads typed fields of `document` and remembers which keys it has read.

    Whole numbers are bounded by `limits.MAX_INTEGER`, up and down, unless a read says more.
    """

    def __init__(self, document: Mapping[str, object], *, where: object, prefix: str = "") -> None:
        """Read from `document`, found at `where`; `prefix` is the path to a nested object."""
        self._document = document
        self._where = where
        self._prefix = prefix
        self._read: set[str] = set()

    def integer(
        self,
        *names: str,
        default: int | _Required = REQUIRED,
        least: int = -MAX_INTEGER,
        most: int = MAX_INTEGER,
    ) -> int:
        """Return a whole number from `least` to `most`; null counts as missing."""
        name, value = self._value(names, default)
        return self._integer(name, value, least=least, most=most)

    def optional_integer(self, *names: str) -> int | None:
        """Return a whole number, or None where the field is null or missing."""
        name, value = self._value(names, None)
        return None if value is None else self._integer(name, value)

    def number(self, *names: str, default: float | _Required = REQUIRED) -> float:
        """Return a finite number as a float."""
        name, value = self._value(names, default)
        return self._number(name, value)

    def optional_number(self, *names: str) -> float | None:
        """Return a finite number as a float, or None where the field is null or missing."""
        name, value = self._value(names, None)
        return None if value is None else self._number(name, value)

    def numbers(self, name: str) -> tuple[float, ...] | None:
        """Return a list of finite numbers, or None where the field is null or missing."""
        _, value = self._value((name,), None)
        if value is None:
            return None
        if not isinstance(value, list):
            raise self._wrong(name, "a list of numbers", value)
        items = cast("list[object]", value)
        return tuple(self._number(name, item) for item in items)

    def boolean(self, *names: str, default: bool | _Required = REQUIRED) -> bool:
        """Return true or false."""
        name, value = self._value(names, default)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false", value)
        return value

    def text(self, *names: str, default: str | _Required = REQUIRED) -> str:
        """Return a string."""
        name, value = self._value(names, default)
        if not isinstance(value, str):
            raise self._wrong(name, "a string", value)
        return value

    def integers(self, *names: str) -> tuple[int, ...]:
        """Return a list of whole numbers; one number counts as a list of one, null as none."""
        name, value = self._value(names, None)
        if value is None or isinstance(value, list):
            return self.integer_list(*names)
        return (self._integer(name, value),)

    def integer_list(self, *names: str) -> tuple[int, ...]:
        """Return a list of whole numbers, empty where the field is null or missing."""
        name, value = self._value(names, None)
        if value is None:
            return ()
        if not isinstance(value, list):
            raise self._wrong(name, "a list of whole numbers", value)
        items = cast("list[object]", value)
        return tuple(self._integer(name, item) for item in items)

    def texts(self, name: str) -> tuple[str, ...] | None:
        """Return a list of strings, or None where the field is null or missing."""
        _, value = self._value((name,), None)
        if value is None:
            return None
        items = cast("list[object]", value) if isinstance(value, list) else []
        if not items or any(not isinstance(item, str) for item in items):
            raise self._wrong(name, "a list of strings", cast("object", value))
        return tuple(cast("list[str]", items))

    def mapping(self, *names: str) -> Mapping[str, object] | None:
        """Return an object, or None where the field is null or missing."""
        name, value = self._value(names, None)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._wrong(name, "an object", value)
        return cast("dict[str, object]", value)

    def nested(self, name: str) -> Fields | None:
        """Return a reader of a nested object, or None where it is null or missing."""
        value = self.mapping(name)
        return None if value is None else self.inside(name, value)

    def inside(self, name: str, document: Mapping[str, object]) -> Fields:
        """Return a reader of an object that stands, or could stand, in the field `name`."""
        return Fields(document, where=self._where, prefix=f"{self._prefix}{name}.")

    def raw(self, name: str) -> object:
        """Return a field of any type as it stands, or None where it is missing."""
        return self._value((name,), None)[1]

    def expect(self, name: str, *allowed: object) -> None:
        """Require that a field, where present, has one of the allowed values; it stays carried."""
        value = self._document.get(name)
        if name in self._document and not any(same(value, one) for one in allowed):
            raise self._wrong(name, " or ".join(repr(one) for one in allowed), value)

    def rest(self) -> dict[str, object]:
        """Return the fields that nothing has read, in their order."""
        return {key: value for key, value in self._document.items() if key not in self._read}

    def refuse_rest(self) -> None:
        """Require that every field was read, but for null ones, which say nothing."""
        for name, value in self.rest().items():
            if value is None:
                continue
            near = get_close_matches(name, sorted(self._read), 1)
            raise ConfigError(
                f"config field {shown(self._prefix + name)} is not known here and may change "
                "the result",
                where=self._where,
                expected=", ".join(self._prefix + known for known in sorted(self._read)),
                found=shown(value),
                hint=f"Is {self._prefix + near[0]!r} meant?"
                if near
                else "Remove it if nothing needs it, or use a version that knows it.",
            )

    def _value(self, names: Sequence[str], default: object) -> tuple[str, object]:
        """Return the spelling that is there, else the first, and its value."""
        self._read.update(names)
        present = [name for name in names if self._document.get(name) is not None]
        if not present:
            if isinstance(default, _Required):
                raise ConfigError(
                    f"config field {self._prefix + names[0]!r} is missing", where=self._where
                )
            return names[0], default
        first, *others = present
        value = self._document[first]
        for name in others:
            other = self._document[name]
            if not same(other, value):
                raise ConfigError(
                    f"config fields {self._prefix + first!r} and {self._prefix + name!r} "
                    "contradict each other",
                    where=self._where,
                    found=f"{shown(value)} and {shown(other)}",
                    hint="Both spell the same thing; remove the wrong one.",
                )
        return first, value

    def _integer(
        self, name: str, value: object, *, least: int = -MAX_INTEGER, most: int = MAX_INTEGER
    ) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(name, "a whole number", value)
        if not least <= value <= most:
            raise self._wrong(name, f"a whole number from {least} to {most}", value)
        return value

    def _number(self, name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, "a number", value)
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self._wrong(name, "a finite number", value)
        return number

    def _wrong(self, name: str, expected: str, found: object) -> ConfigError:
        return ConfigError(
            f"config field {self._prefix + name!r} is not valid",
            where=self._where,
            expected=expected,
            found=shown(found),
        )


def same(left: object, right: object) -> bool:
    """Equality that keeps true apart from 1."""
    return left == right and isinstance(left, bool) == isinstance(right, bool)
