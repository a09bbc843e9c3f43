"""Texts without tokens: what is printed or recorded must not hold what opens an account."""

from __future__ import annotations

import os
import re

_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}|Bearer +[^\s\"',]+", re.IGNORECASE)
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_BLOT = "[token]"


def without_secrets(text: str, *, also: str | None = None) -> str:
    """Return a text with tokens blotted out: those of the environment, and what looks like one.

    Args:
        text: from anywhere.
        also: one more token, as from a stored login.
    """
    known = (also, *(os.environ.get(name, "").strip() for name in _VARIABLES))
    for token in known:
        if token:
            text = text.replace(token, _BLOT)
    return _TOKEN.sub(_BLOT, text)
