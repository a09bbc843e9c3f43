"""Quantised values to fp32 and on to a plain dtype, rounded once. Imports torch.

    fp8_block   float8 e4m3 x scale of its block
    int4_group  (nibble - 8) x scale of its group of columns
    mxfp4       float4 e2m1 x 2^(e8m0 - 127) of its group of columns

Stored bits are shifted to where bfloat16 has its exponent and mantissa, which makes a value too
small by a known power of two; torch's own conversion from float8 takes seven times as long (0.28
against 1.9 10^9 values per second on one core). Products are exact or rounded in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from kimi_convert.config.quantization import Encoding, Quantization

# Powers of two between a float8 e4m3 (bias 7) or a float4 e2m1 (bias 1) and bfloat16 (bias 127).
_E4M3_STEP = 2.0**120
_E2M1_STEP = 2.0**126


_E4M3_NAN = 0x7F  # without its sign; it is the only one, and there is no Inf
_PIECE_ROWS = 64  # decoded at once where a tile is one row: what is in flight stays in cache


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
    factors = scale_values(scales, quantization.encoding)
    tile_rows = quantization.tile_rows
    step = tile_rows if tile_rows > 1 else _PIECE_ROWS
    pieces: list[torch.Tensor] = []
    for first in range(0, values.shape[0], step):
        wide = unpack(values[first : first + step])  # [r, K] fp32
        tiles = factors[first // tile_rows : -(-(first + wide.shape[0]) // tile_rows)]
        _multiply_(wide, tiles, quantization.tile_columns)
        pieces.append(wide.to(dtype))
    return torch.cat(pieces) if pieces else values.new_empty(values.shape, dtype=dtype)


def scale_values(scales: torch.Tensor, encoding: Encoding) -> torch.Tensor:
    """Return stored scales in fp32; NaN and Inf stay."""
    if encoding is Encoding.MXFP4:
        return scales.view(torch.float8_e8m0fnu).float()
    return scales.float()


def _multiply_(wide: torch.Tensor, factors: torch.Tensor, columns: int) -> None:
    """Multiply rows [R, K] by factors [1 or R, tiles of K]; the last tile may be narrower."""
    whole = wide.shape[1] // columns
    if whole:
        tiles = wide[:, : whole * columns].view(-1, whole, columns)
        tiles.mul_(factors[:, :whole, None])
    wide[:, whole * columns :].mul_(factors[:, whole:])


def _unpack_e4m3(values: torch.Tensor) -> torch.Tensor:
    stored = values.view(torch.int8)
    if int(stored.bitwise_and(_E4M3_NAN).amax()) == _E4M3_NAN:
        return values.float()
    # s eeee mmm becomes s 0000eeee mmm0000.
    bits = stored.to(torch.int16).bitwise_left_shift_(4).bitwise_and_(0x87F0 - 0x10000)
    return bits.view(torch.bfloat16).float().mul_(_E4M3_STEP)


def _unpack_int4(values: torch.Tensor) -> torch.Tensor:
    return _nibbles(values).float().sub_(8)


def _unpack_e2m1(values: torch.Tensor) -> torch.Tensor:
    # s ee m becomes s 000000ee m000000.
    nibbles = _nibbles(values).to(torch.int16)
    sign = nibbles.bitwise_and(8).bitwise_left_shift_(12)
    bits = nibbles.bitwise_and_(7).bitwise_left_shift_(6).bitwise_or_(sign)
    return bits.view(torch.bfloat16).float().mul_(_E2M1_STEP)


def _nibbles(values: torch.Tensor) -> torch.Tensor:
    """Return [R, K] int8 from 0 to 15: of each byte the low nibble first, bytes as they lie."""
    pairs = values.view(torch.uint8).to(torch.int16)
    high = pairs.bitwise_and(0xF0).bitwise_left_shift_(4)
    return pairs.bitwise_and_(0x0F).bitwise_or_(high).view(torch.int8)


_UNPACK: Mapping[Encoding, Callable[[torch.Tensor], torch.Tensor]] = MappingProxyType(
    {
        Encoding.FP8_BLOCK: _unpack_e4m3,
        Encoding.INT4_GROUP: _unpack_int4,
        Encoding.MXFP4: _unpack_e2m1,
    }
)
