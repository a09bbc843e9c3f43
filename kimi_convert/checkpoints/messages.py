"""How names, lists and sizes look in error messages: short, and safe to print on a terminal."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice

_SHOWN_ITEMS = 10
_SHOWN_CHARACTERS = 120
_UNITS = ("bytes", "kB", "MB", "GB", "TB")


def quoted(value: object) -> str:
    """Return `repr(value)`, which escapes control characters, cut to a readable length."""
    if isinstance(value, str):
        value = value[: _SHOWN_CHARACTERS + 1]
    text = ascii(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."


def listed(names: Collection[str]) -> str:
    """Return the first names and the number of those left out: "a, b and 12 more"."""
    more = len(names) - _SHOWN_ITEMS
    shown = ", ".join(quoted(name) for name in islice(names, _SHOWN_ITEMS))
    return f"{shown} and {more} more" if more > 0 else shown


def sized(nbytes: int) -> str:
    """Return a byte count exactly, and in decimal units where that reads better."""
    exact = f"{nbytes} bytes"
    power = min((len(str(nbytes)) - 1) // 3, len(_UNITS) - 1)
    return exact if power == 0 else f"{exact} ({nbytes / 1000**power:.1f} {_UNITS[power]})"
