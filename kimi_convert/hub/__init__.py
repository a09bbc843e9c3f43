"""Checkpoints on the Hugging Face Hub, or on a server that speaks like it.

The only package that imports huggingface_hub, and only when one of its names is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from kimi_convert.hub.reference import Reference, parse_reference, reference_of

if TYPE_CHECKING:
    from kimi_convert.hub.download import DownloadResult, download_checkpoint
    from kimi_convert.hub.publish import PublishOptions, PublishResult, publish_checkpoint

__all__ = [
    "DownloadResult",
    "PublishOptions",
    "PublishResult",
    "Reference",
    "download_checkpoint",
    "parse_reference",
    "publish_checkpoint",
    "reference_of",
]

_HOMES = {
    "DownloadResult": "kimi_convert.hub.download",
    "download_checkpoint": "kimi_convert.hub.download",
    "PublishOptions": "kimi_convert.hub.publish",
    "PublishResult": "kimi_convert.hub.publish",
    "publish_checkpoint": "kimi_convert.hub.publish",
}


def __getattr__(name: str) -> object:
    """Import what needs huggingface_hub when it is first asked for."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
