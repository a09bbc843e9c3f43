"""Sizes as people write them: "5GB", "1.5 GiB", "800000"."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType

from kimi_convert.checkpoints.messages import quoted
from kimi_convert.errors import UsageError

_UNIT_BYTES: Mapping[str, int] = MappingProxyType(
    {
        "": 1,
        "b": 1,
        "kb": 1000,
        "mb": 1000**2,
        "gb": 1000**3,
        "tb": 1000**4,
        "kib": 1024,
        "mib": 1024**2,
        "gib": 1024**3,
        "tib": 1024**4,
    }
)
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([a-z]*)", re.IGNORECASE | re.ASCII)


def parse_byte_size(text: str) -> int:
    """Return a number of bytes >= 1; units are decimal (kB, MB, GB, TB) or binary (KiB, ...).

    Raises:
        UsageError: not a number with a known unit, or not a whole number of bytes.
    """
    found = _SIZE.fullmatch(text.strip())
    unit = _UNIT_BYTES.get(found[2].lower()) if found else None
    nbytes = Fraction(found[1]) * unit if found and unit else Fraction(0)
    if nbytes < 1 or nbytes.denominator != 1:
        raise UsageError(
            "not a size",
            expected="a whole number of bytes >= 1 with a unit B, kB, MB, GB, TB, KiB, MiB, "
            "GiB or TiB, such as 5GB",
            found=quoted(text),
        )
    return int(nbytes)
