"""Plain values to FP8 blocks: the largest of a block becomes 448, the largest e4m3. Imports torch."""

from __future__ import annotations

import torch

from kimi_convert.config.quantization import FP8_TILE

_E4M3_MAX = 448.0


def encode_fp8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values [R, K] in float8 e4m3 and their scales [tiles of R, tiles of K] in fp32.

    Args:
        rows: [R, K] of any float dtype, beginning at a block's first row; blocks at the edge are
            cut. A block of zeros gets the scale 1.
    """
    count, columns = rows.shape
    tiles = -(-count // FP8_TILE), -(-columns // FP8_TILE)
    padded = rows.new_zeros((tiles[0] * FP8_TILE, tiles[1] * FP8_TILE), dtype=torch.float32)
    padded[:count, :columns] = rows
    blocks = padded.view(tiles[0], FP8_TILE, tiles[1], FP8_TILE)
    largest = blocks.abs().amax((1, 3))
    scales = torch.where(largest > 0, largest / _E4M3_MAX, 1.0)
    blocks.div_(scales[:, None, :, None]).clamp_(-_E4M3_MAX, _E4M3_MAX)
    values = padded[:count, :columns].to(torch.float8_e4m3fn)
    return values, scales
