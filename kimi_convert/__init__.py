"""Turn full-attention MLA checkpoints into Kimi-Linear hybrids of KDA and MLA layers.

The jobs of the command line are functions here. A name is imported when it is first used, so
that importing the package, or asking the command line for help, does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kimi_convert.config.recipe import load_recipe
    from kimi_convert.conversion import convert_checkpoint, plan_conversion
    from kimi_convert.errors import KimiConvertError
    from kimi_convert.exporters.safetensors import export_safetensors
    from kimi_convert.model.generation import generate
    from kimi_convert.model.loading import load_model
    from kimi_convert.model.summary import summarize_checkpoint as inspect_checkpoint
    from kimi_convert.model.tokenizer import load_tokenizer
    from kimi_convert.validation import validate_checkpoint

__version__ = "0.1.0"

__all__ = [
    "KimiConvertError",
    "__version__",
    "convert_checkpoint",
    "export_safetensors",
    "generate",
    "inspect_checkpoint",
    "load_model",
    "load_recipe",
    "load_tokenizer",
    "plan_conversion",
    "validate_checkpoint",
]

_HOMES = {
    "KimiConvertError": ("kimi_convert.errors", "KimiConvertError"),
    "convert_checkpoint": ("kimi_convert.conversion", "convert_checkpoint"),
    "export_safetensors": ("kimi_convert.exporters.safetensors", "export_safetensors"),
    "generate": ("kimi_convert.model.generation", "generate"),
    "inspect_checkpoint": ("kimi_convert.model.summary", "summarize_checkpoint"),
    "load_model": ("kimi_convert.model.loading", "load_model"),
    "load_recipe": ("kimi_convert.config.recipe", "load_recipe"),
    "load_tokenizer": ("kimi_convert.model.tokenizer", "load_tokenizer"),
    "plan_conversion": ("kimi_convert.conversion", "plan_conversion"),
    "validate_checkpoint": ("kimi_convert.validation", "validate_checkpoint"),
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return __all__
