"""How quantised weights are stored, as config.json's `quantization_config` says it.

Three formats, each with scales for tiles of a matrix: FP8 blocks (DeepSeek-V3, Kimi-K2), INT4
groups packed in int32 (Kimi-K2-Thinking, K2.5) and MXFP4 (Kimi-K3). Names, shapes and bytes are
`checkpoints.weights`' and `checkpoints.decoding`'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from kimi_convert.config.fields import Fields
from kimi_convert.config.limits import shown
from kimi_convert.errors import ConfigError

FIELD = "quantization_config"
FP8_TILE = 128  # of every released checkpoint, and of what is written here
FP8_SCALE_SUFFIX = "_scale_inv"  # after the name of the values
_MAX_TILE = 4096
_MXFP4_GROUP = 32
_HINT = "fp8 blocks, int4 pack-quantized and mxfp4-pack-quantized are read; convert a bf16 copy."


class Encoding(StrEnum):
    """How the values of one weight are stored."""

    PLAIN = "plain"
    FP8_BLOCK = "fp8_block"  # float8 e4m3 times an fp32 scale for each block
    INT4_GROUP = "int4_group"  # nibble - 8, times a scale for each group of a row
    MXFP4 = "mxfp4"  # float4 e2m1 times a power of two for each group of a row


@dataclass(frozen=True, slots=True)
class Quantization:
    """One format: the encoding, and the tile of a matrix [out, in] that shares a scale."""

    encoding: Encoding
    tile_rows: int
    tile_columns: int


def read_quantization(
    document: Mapping[str, object] | None, *, where: object
) -> Quantization | None:
    """Read a `quantization_config`; None, as in a config.json without one, gives None.

    Args:
        document: the object, as it stands.
        where: the checkpoint, for messages.

    Raises:
        ConfigError: a format that is not supported, or a field that is missing or wrong.
    """
    if document is None:
        return None
    fields = Fields(document, where=where, prefix=f"{FIELD}.")
    method = fields.text("quant_method", default="")
    read = _READERS.get(method)
    try:
        if read is None:
            raise _unsupported("quant_method", " or ".join(_READERS), method)
        return read(fields)
    except ConfigError as error:
        error.where = error.where or str(where)
        raise


def fp8_quantization(plain_modules: Sequence[str] = ()) -> dict[str, object]:
    """Return the `quantization_config` of FP8 blocks, as DeepSeek-V3 and Kimi-K2 write it.

    Args:
        plain_modules: names of modules whose matrices are not quantised, as transformers lists
            them.
    """
    document: dict[str, object] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [FP8_TILE, FP8_TILE],
    }
    return (
        {**document, "modules_to_not_convert": list(plain_modules)} if plain_modules else document
    )


def _fp8(fields: Fields) -> Quantization:
    _expect(fields.text("fmt", default="e4m3"), "fmt", "e4m3")
    block = fields.integer_list("weight_block_size")
    if len(block) != 2 or not all(1 <= size <= _MAX_TILE for size in block):
        raise _unsupported("weight_block_size", "rows and columns of a block", block)
    return Quantization(Encoding.FP8_BLOCK, block[0], block[1])


def _compressed_tensors(fields: Fields) -> Quantization:
    groups = fields.mapping("config_groups") or {}
    if len(groups) != 1:
        raise _unsupported("config_groups", "one group", list(groups))
    (name,) = groups
    group = fields.inside("config_groups", groups).nested(name) or fields.inside(name, {})
    weights = group.nested("weights") or group.inside("weights", {})
    stated = fields.text("format", default=group.text("format", default=""))
    kind = weights.text("type", default="")
    if (stated, kind) == ("pack-quantized", "int"):
        encoding = Encoding.INT4_GROUP
    elif (stated, kind) == ("mxfp4-pack-quantized", "float"):
        encoding = Encoding.MXFP4
    else:
        expected = "pack-quantized int or mxfp4-pack-quantized float"
        raise _unsupported("format", expected, f"{stated} {kind}")
    _expect(weights.raw("num_bits"), "num_bits", 4)
    _expect(weights.raw("strategy"), "strategy", "group")
    _expect(weights.raw("symmetric"), "symmetric", True)
    _expect(weights.raw("actorder"), "actorder", None)
    size = weights.integer("group_size")
    if not 1 <= size <= _MAX_TILE or (encoding is Encoding.MXFP4 and size != _MXFP4_GROUP):
        raise _unsupported("group_size", f"{_MXFP4_GROUP}", size)
    return Quantization(encoding, 1, size)


_READERS: Mapping[str, Callable[[Fields], Quantization]] = MappingProxyType(
    {"fp8": _fp8, "compressed-tensors": _compressed_tensors}
)


def _expect(found: object, name: str, expected: object) -> None:
    if found != expected:
        raise _unsupported(name, expected, found)


def _unsupported(name: str, expected: object, found: object) -> ConfigError:
    return ConfigError(
        "the checkpoint is quantised in a way that is not supported",
        expected=f"{FIELD}.{name} {expected}",
        found=shown(found),
        hint=_HINT,
    )
