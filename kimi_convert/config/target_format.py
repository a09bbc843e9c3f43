"""The formats that a hybrid can be written in."""

from __future__ import annotations

from enum import StrEnum

from kimi_convert.config.bailing_hybrid import BAILING_TYPE
from kimi_convert.config.kimi_linear import TARGET_TYPE
from kimi_convert.config.limits import shown
from kimi_convert.errors import RecipeError


class TargetFormat(StrEnum):
    """A model type that a conversion can make."""

    KIMI_LINEAR = TARGET_TYPE  # MLA layers that stay do not rotate
    BAILING_HYBRID = BAILING_TYPE  # Ling-3: they keep their rotation


def output_format(text: str) -> TargetFormat:
    """Return the format of a name.

    Raises:
        RecipeError: there is no such format.
    """
    if text not in {*TargetFormat}:
        raise RecipeError(
            "recipe field 'output.format' is not valid",
            expected=" or ".join(TargetFormat),
            found=shown(text),
        )
    return TargetFormat(text)
