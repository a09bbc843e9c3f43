"""Weights as 4- or 8-bit integers in blocks, in the layout of MatMulNBits, QMoE and GatherBlockQuantized.

A block of `BLOCK` weights of one row has one scale s, and w = s (q - zero) with q unsigned and zero in
the middle. The element that is largest in size becomes -zero exactly, so that the sign of s makes use
of the one value that two's complement has more; of several such scales, shrunken ones too, the one with
the least squared error is taken. No data are needed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

BLOCK = 32

# Factors on the scale that maps the largest weight exactly.
_FACTORS = tuple(np.linspace(0.75, 1.05, 13, dtype=np.float32).tolist())


class Quantized(NamedTuple):
    """Blocks of one matrix."""

    packed: np.ndarray  # [N, K / BLOCK, BLOCK bits / 8] uint8, lower bits first
    scales: np.ndarray  # [N, K / BLOCK] fp32


def num_blocks(width: int) -> int:
    """Return how many blocks a row of so many weights has; the last may be short."""
    return -(-width // BLOCK)


def quantize(weight: np.ndarray, bits: int) -> Quantized:
    """Quantise a matrix [N, K] fp32; what a last block lacks counts as zero."""
    rows, width = weight.shape
    blocks = np.zeros((rows, num_blocks(width) * BLOCK), dtype=np.float32)
    blocks[:, :width] = weight
    blocks = blocks.reshape(rows, -1, BLOCK)
    scales = _best_scales(blocks, bits)
    zero = 1 << (bits - 1)
    integers = (_rounded(blocks, scales, zero) + zero).astype(np.uint8)
    return Quantized(_packed(integers, bits), scales[..., 0])


def dequantize(quantized: Quantized, bits: int, width: int) -> np.ndarray:
    """Return the matrix [N, width] fp32 that runtimes compute with."""
    packed, scales = quantized
    integers = packed
    if bits == 4:
        integers = np.stack((packed & 15, packed >> 4), axis=-1).reshape(*packed.shape[:-1], -1)
    values = (integers.astype(np.float32) - (1 << (bits - 1))) * scales[..., None]
    return values.reshape(len(packed), -1)[:, :width]


def _best_scales(blocks: np.ndarray, bits: int) -> np.ndarray:
    """Return the scale of each block, [N, K / BLOCK, 1]."""
    zero = 1 << (bits - 1)
    at = np.abs(blocks).argmax(axis=-1, keepdims=True)
    exact = np.take_along_axis(blocks, at, axis=-1) / np.float32(-zero)
    exact[exact == 0] = 1.0
    best, least = exact, np.full(exact.shape, np.inf, dtype=np.float32)
    for factor in _FACTORS:
        scales = exact * np.float32(factor)
        error = np.square(_rounded(blocks, scales, zero) * scales - blocks).sum(-1, keepdims=True)
        better = error < least
        best, least = np.where(better, scales, best), np.where(better, error, least)
    return best


def _rounded(blocks: np.ndarray, scales: np.ndarray, zero: int) -> np.ndarray:
    return np.clip(np.rint(blocks / scales), -zero, zero - 1)


def _packed(integers: np.ndarray, bits: int) -> np.ndarray:
    return integers if bits == 8 else integers[..., 0::2] | (integers[..., 1::2] << 4)
