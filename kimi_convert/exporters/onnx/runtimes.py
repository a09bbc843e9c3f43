"""Which ONNX Runtime loads what, as far as it was tried: said before a file is written.

Tried were 1.20.1, 1.24.1 and 1.32.0. A version in between is taken for the one below it.
"""

from __future__ import annotations

import re

from kimi_convert.errors import UsageError

Version = tuple[int, int]

FUSED_EXPERTS: Version = (1, 24)  # com.microsoft::MoE with interleaved rows
INTEGER_WEIGHTS: Version = (1, 32)  # GatherBlockQuantized, and QMoE in blocks

_LARGEST_OPSETS: tuple[tuple[Version, int], ...] = (((1, 20), 21), ((1, 24), 25), ((1, 32), 28))


def parse_version(text: str) -> Version:
    """Return major and minor version of "1.24" or "1.24.1".

    Raises:
        UsageError: it is neither, or older than any that runs the graphs.
    """
    found = re.fullmatch(r"(\d{1,4})\.(\d{1,4})(\.\d{1,4})?", text)
    oldest = _LARGEST_OPSETS[0][0]
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    if version < oldest:
        raise UsageError(
            "not a version of ONNX Runtime that graphs are made for",
            expected=f"{shown(oldest)} or newer",
            found=repr(text),
        )
    return version


def largest_opset(version: Version) -> int:
    """Return the largest opset that a version is known to load."""
    return max(opset for known, opset in _LARGEST_OPSETS if known <= version)


def shown(version: Version) -> str:
    """Return a version as it is written."""
    return ".".join(map(str, version))
