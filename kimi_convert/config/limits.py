"""How large the numbers of a config may be, and the error for a field that is not valid.

The bounds lie far above every released model. They keep a hostile config.json from filling memory
with layers or tensors that do not exist, and every product of sizes within ordinary arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from kimi_convert.errors import ConfigError

MAX_INTEGER = 2**31 - 1
MAX_LAYERS = 1024
# Kimi-K2 has 23,424 experts in all its layers, each of three tensors that tables enumerate.
MAX_EXPERTS_IN_ALL = 2**18
MAX_HEADS = 2**14
MAX_WIDTH = 2**24  # of anything that is one axis of a matrix
MAX_CONV_SIZE = 1024

_SHOWN_CHARACTERS = 80
_SHOWN_ITEMS = 20


def shown(value: object) -> str:
    """Return a value as error messages show it: short, control characters escaped."""
    if isinstance(value, list | tuple):
        value = list(cast("Sequence[object]", value)[:_SHOWN_ITEMS])
    try:
        text = ascii(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return "a number of more than 4300 digits"
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."


def require(holds: bool, field_name: str, expected: object, found: object) -> None:
    """Refuse a field unless `holds`.

    Raises:
        ConfigError: `holds` is false. `field_name` may give a second spelling: "one or two".
    """
    if not holds:
        names = " or ".join(repr(name) for name in field_name.split(" or "))
        raise ConfigError(
            f"config field {names} is not valid", expected=expected, found=shown(found)
        )


def require_size(field_name: str, value: int, most: int, *, least: int = 1) -> None:
    """Refuse a whole number below `least` or above `most`.

    Raises:
        ConfigError: it is one of the two.
    """
    require(least <= value <= most, field_name, f"a number from {least} to {most}", value)
