"""Quantised values, decoded: bit for bit what the formats' definitions say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kimi_convert.checkpoints.decoding import decode
from kimi_convert.config.quantization import Encoding, Quantization
from tests.quantized import E2M1, E4M3, GROUP, PARTS, TILE, to_bf16

FORMATS = {
    "fp8": Quantization(Encoding.FP8_BLOCK, TILE, TILE),
    "int4": Quantization(Encoding.INT4_GROUP, 1, GROUP),
    "mxfp4": Quantization(Encoding.MXFP4, 1, 32),
}


def bits(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


@pytest.mark.parametrize("rows", [1, 16, 37, 130])
@pytest.mark.parametrize("scheme", FORMATS)
def test_decoding_follows_the_formula_bit_for_bit(scheme, rows):
    generator = torch.Generator().manual_seed(rows)
    parts, expected = PARTS[scheme]((rows, 96), generator)
    values, scales, *_ = parts.values()
    found = decode(values, scales, FORMATS[scheme], torch.bfloat16)
    assert torch.equal(bits(found), bits(expected))


def test_ragged_blocks_keep_their_own_scales():
    parts, expected = PARTS["fp8"]((37, 41), torch.Generator().manual_seed(0))
    found = decode(*parts.values(), FORMATS["fp8"], torch.bfloat16)
    assert parts["weight_scale_inv"].shape == (3, 3)
    assert torch.equal(bits(found), bits(expected))


@pytest.mark.parametrize("scale", [1.0, 2.0**-126, 3.0e38, 448.0, 1 / 3])
def test_every_e4m3_value_is_exact_times_any_scale(scale):
    stored = torch.arange(256, dtype=torch.uint8)[None].view(torch.float8_e4m3fn)
    scales = torch.full((1, 1), scale)
    found = decode(stored, scales, Quantization(Encoding.FP8_BLOCK, 1, 256), torch.float32)
    with np.errstate(over="ignore"):
        expected = torch.from_numpy(E4M3.astype(np.float32) * np.float32(scale))[None]
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(bits(found.nan_to_num(0)), bits(expected.nan_to_num(0)))


def test_every_e2m1_value_is_exact_times_every_power_of_two():
    nibbles = torch.arange(16, dtype=torch.uint8).repeat(2)
    packed = (nibbles[::2] | nibbles[1::2] << 4).repeat(254, 1)
    exponents = torch.arange(254, dtype=torch.uint8)[:, None]
    found = decode(packed, exponents, FORMATS["mxfp4"], torch.bfloat16)
    powers = 2.0 ** (np.arange(254.0) - 127)
    with np.errstate(over="ignore"):
        expected = to_bf16((np.tile(E2M1, 2)[None] * powers[:, None]).astype(np.float32))
    assert torch.equal(bits(found), bits(expected))


def test_e8m0_255_is_nan():
    packed = torch.full((1, 16), 0x22, dtype=torch.uint8)
    found = decode(
        packed, torch.full((1, 1), 255, dtype=torch.uint8), FORMATS["mxfp4"], torch.float32
    )
    assert found.isnan().all()


def test_other_dtypes_are_rounded_once():
    parts, _ = PARTS["fp8"]((32, 32), torch.Generator().manual_seed(1))
    wide = decode(*parts.values(), FORMATS["fp8"], torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(decode(*parts.values(), FORMATS["fp8"], dtype), wide.to(dtype))
