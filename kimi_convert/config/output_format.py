"""How a conversion's output is stored, where it is not simply as its source: dtype, MTP layers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class TargetDtype(StrEnum):
    """What feed-forward weights are written in; all else is in the dtype of config.json."""

    SOURCE = "source"  # that dtype too
    FP8 = "fp8"  # blocks of 128 x 128 with a scale each, as DeepSeek-V3 and Kimi-K2 store them


class MtpLayers(StrEnum):
    """What becomes of the source's multi-token-prediction layers, which the format has no use for."""

    DROP = "drop"
    KEEP = "keep"  # as they are, under their numbers: loaders of the format skip them


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFormat:
    """Every choice about how the same values are stored."""

    dtype: TargetDtype = TargetDtype.SOURCE
    mtp: MtpLayers = MtpLayers.DROP


AS_SOURCE = OutputFormat()
