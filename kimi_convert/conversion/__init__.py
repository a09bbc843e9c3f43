"""Turn an MLA checkpoint into a Kimi-Linear hybrid: plan it, then carry the plan out."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from kimi_convert.conversion.plan import ConversionPlan, plan_conversion

if TYPE_CHECKING:
    from kimi_convert.conversion.engine import ConversionResult
    from kimi_convert.conversion.fitted import convert_checkpoint

__all__ = ["ConversionPlan", "ConversionResult", "convert_checkpoint", "plan_conversion"]


_HOMES = {
    "ConversionResult": "kimi_convert.conversion.engine",
    "convert_checkpoint": "kimi_convert.conversion.fitted",
}


def __getattr__(name: str) -> object:
    """Import what needs torch when it is first asked for."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
