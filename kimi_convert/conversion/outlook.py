"""What a conversion by the default recipe would give, told from a config alone.

No header is read: `plan` says the same to the byte.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kimi_convert.checkpoints.dtypes import DTYPES, dtype_from_torch_name
from kimi_convert.checkpoints.mapping import Storage
from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.recipe import Recipe
from kimi_convert.conversion.target import target_config
from kimi_convert.errors import InputError
from kimi_convert.model.cache_size import CacheSize, cache_size
from kimi_convert.model.names.layout import tensor_kinds

# What a disk of the development machine takes; the writing is bound by the disk (docs/scale.md).
_BYTES_PER_SECOND = 250e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """A conversion that is not planned yet."""

    mla_layers: int
    kda_layers: int
    parameters: int
    output_bytes: int
    cache: CacheSize

    @property
    def writing_seconds(self) -> float:
        """Time to write the output on a disk as that of the development machine."""
        return self.output_bytes / _BYTES_PER_SECOND

    def to_json(self) -> dict[str, object]:
        """Return the fields."""
        return {
            "mla_layers": self.mla_layers,
            "kda_layers": self.kda_layers,
            "parameters": self.parameters,
            "output_bytes": self.output_bytes,
            "writing_seconds": round(self.writing_seconds, 1),
            "cache": self.cache.to_json(),
        }


def conversion_outlook(source: ModelConfig) -> Outlook | InputError:
    """Return what a conversion would give, or the error that says why there is none."""
    try:
        target = target_config(source, Recipe())
    except InputError as error:
        return error
    width = DTYPES[dtype_from_torch_name(target.dtype)].width_bytes
    parameters = output = 0
    for row, shape, count in tensor_kinds(target):
        size = count * math.prod(shape)
        parameters += size
        output += size * (4 if row.storage is Storage.FP32 else width)
    return Outlook(
        mla_layers=len(target.mla_layers),
        kda_layers=len(target.kda_layers),
        parameters=parameters,
        output_bytes=output,
        cache=cache_size(target),
    )
