"""Quantised values to fp32 and on to a plain dtype, rounded once. Imports torch.

    fp8_block   float8 e4m3 x scale of its block
    int4_group  (nibble - 8) x scale of its group of columns
    mxfp4       float4 e2m1 x 2^(e8m0 - 127) of its group of columns

Bits of float8 are shifted to where bfloat16 has its exponent and mantissa, which makes a value too
small by a known power of two; the scales make up for it. torch's own conversion from float8 takes
seven times as long. Nibbles are looked up, four at once. A few rows are decoded at a time, in memory
that is used again, so that they stay in the processor's cache. Products are exact or rounded in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType

import numpy as np
import torch

from kimi_convert.config.quantization import Encoding, Quantization

# Between the exponents of float8 e4m3 (bias 7) and bfloat16 (bias 127).
_E4M3_STEP = 2.0**120
_LARGEST_SCALE = 2.0**7  # a scale below it can be multiplied by the step
_PIECE_ROWS = 64  # decoded at once where a tile is one row

_INT4 = tuple(float(nibble - 8) for nibble in range(16))
_E2M1_SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = (*_E2M1_SIZES, *(-size for size in _E2M1_SIZES))


def decode(
    values: torch.Tensor, scales: torch.Tensor, quantization: Quantization, dtype: torch.dtype
) -> torch.Tensor:
    """Return rows of a weight [R, K], rounded once to `dtype`.

    Args:
        values: the stored rows, [R, K / values per element], beginning at a tile's first row.
        scales: [tiles of these rows, tiles of K], as stored.
        quantization: the format.
        dtype: of the result.
    """
    unpack = _UNPACK[quantization.encoding]
    rows = values.shape[0]
    columns = values.shape[1] * _values_per_element(values, quantization.encoding)
    result = torch.empty((rows, columns), dtype=dtype)
    if not result.numel():
        return result
    factors = scale_values(scales, quantization.encoding)
    lift = 1.0 if quantization.encoding is not Encoding.FP8_BLOCK else _E4M3_STEP
    if bool(factors.abs().amax() < _LARGEST_SCALE):
        factors, lift = factors * lift, 1.0
    tile_rows = quantization.tile_rows
    step = min(rows, tile_rows if tile_rows > 1 else _PIECE_ROWS)
    memory = torch.empty((step, columns))
    for first in range(0, rows, step):
        into = result[first : first + step]
        wide = memory[: len(into)]
        unpack(values[first : first + step], wide)
        if lift != 1.0:
            wide.mul_(lift)
        tiles = factors[first // tile_rows : -(-(first + len(into)) // tile_rows)]
        _multiply_(wide, tiles, quantization.tile_columns)
        into.copy_(wide)
    return result


def scale_values(scales: torch.Tensor, encoding: Encoding) -> torch.Tensor:
    """Return stored scales in fp32; NaN and Inf stay."""
    if encoding is Encoding.MXFP4:
        return scales.view(torch.float8_e8m0fnu).float()
    return scales.float()


def _values_per_element(values: torch.Tensor, encoding: Encoding) -> int:
    return 1 if encoding is Encoding.FP8_BLOCK else 2 * values.element_size()


def _multiply_(wide: torch.Tensor, factors: torch.Tensor, columns: int) -> None:
    """Multiply rows [R, K] by factors [1 or R, tiles of K]; the last tile may be narrower."""
    if len(factors) == 1:
        wide.mul_(factors.repeat_interleave(columns, 1)[:, : wide.shape[1]])
        return
    whole = wide.shape[1] // columns
    if whole:
        tiles = wide[:, : whole * columns].view(-1, whole, columns)
        tiles.mul_(factors[:, :whole, None])
    wide[:, whole * columns :].mul_(factors[:, whole:])


def _unpack_e4m3(values: torch.Tensor, wide: torch.Tensor) -> None:
    """Fill `wide` with values / `_E4M3_STEP`."""
    # NaN has all bits set but the sign, so it is the largest of one sign as int8 or as uint8.
    stored = values.view(torch.int8)
    if int(stored.amax()) == 0x7F or int(values.view(torch.uint8).amax()) == 0xFF:
        wide.copy_(values).mul_(1 / _E4M3_STEP)
        return
    # s eeee mmm becomes s 0000eeee mmm0000.
    bits = stored.to(torch.int16).mul_(16).bitwise_and_(0x87F0 - 0x10000)
    wide.copy_(bits.view(torch.bfloat16))


def _unpack_nibbles(values: torch.Tensor, wide: torch.Tensor, meaning: tuple[float, ...]) -> None:
    """Fill `wide` with what each nibble means: of each byte the low one first, bytes as they lie."""
    packed = values.reshape(-1).view(torch.uint8).numpy()
    if packed.nbytes % 2:
        packed = np.append(packed, np.uint8(0))
    quads = np.take(_quads(meaning), packed.view(np.uint16), mode="clip")
    found = torch.frombuffer(quads.data, dtype=torch.bfloat16)
    wide.copy_(found[: wide.numel()].view_as(wide))


@cache
def _quads(meaning: tuple[float, ...]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Return four values in bfloat16, as one number, for each pair of bytes."""
    pairs = torch.arange(2**16)
    nibbles = torch.stack([pairs >> shift & 15 for shift in (0, 4, 8, 12)], 1)
    quads = torch.tensor(meaning, dtype=torch.bfloat16)[nibbles]  # [65536, 4]
    return quads.view(torch.int16).numpy().view(np.uint64).reshape(-1)


def _unpack_int4(values: torch.Tensor, wide: torch.Tensor) -> None:
    _unpack_nibbles(values, wide, _INT4)


def _unpack_e2m1(values: torch.Tensor, wide: torch.Tensor) -> None:
    _unpack_nibbles(values, wide, _E2M1)


_UNPACK: Mapping[Encoding, Callable[[torch.Tensor, torch.Tensor], None]] = MappingProxyType(
    {
        Encoding.FP8_BLOCK: _unpack_e4m3,
        Encoding.INT4_GROUP: _unpack_int4,
        Encoding.MXFP4: _unpack_e2m1,
    }
)
