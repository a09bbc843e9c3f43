"""Domains of operators beside the standard's, and the version of each that graphs are written in."""

from __future__ import annotations

from collections.abc import Mapping

MICROSOFT = "com.microsoft"
KIMI = "ai.kimi"
DOMAIN_VERSIONS: Mapping[str, int] = {MICROSOFT: 1, KIMI: 1}
