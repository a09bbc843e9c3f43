"""Quantised twins of tiny checkpoints, by formulas of their own, in numpy, value by value.

`quantize_checkpoint` rewrites a plain checkpoint in one of the formats, and `plain_twin` writes
what that stands for in bf16. Nothing here shares code with the package's decoding.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_config, write_tiny_checkpoint

TILE = 16  # of fp8 blocks here: tiny matrices have ragged edges with it
GROUP = 8  # of int4 here; MXFP4 has 32 always

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [TILE, TILE],
}


def compressed(kind, layout, group):
    weights = {
        "num_bits": 4,
        "type": kind,
        "strategy": "group",
        "group_size": group,
        "symmetric": True,
        "actorder": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


INT4 = compressed("int", "pack-quantized", GROUP)
MXFP4 = compressed("float", "mxfp4-pack-quantized", 32)
CONFIGS = {"fp8": FP8, "int4": INT4, "mxfp4": MXFP4}

# Which matrices each released model quantises.
_FP8_MATRICES = re.compile(
    r"\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj|gate_proj|up_proj|down_proj)"
    r"\.weight$"
)
_EXPERTS = re.compile(r"\.experts\.\d+\.(gate|up|down)_proj\.weight$")
MATRICES = {"fp8": _FP8_MATRICES, "int4": _EXPERTS, "mxfp4": _EXPERTS}


def e4m3_value(byte: int) -> float:
    """Read one float8 e4m3 by the definition of OCP FP8."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    if (exponent, mantissa) == (15, 7):
        return float("nan")
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


E4M3 = np.array([e4m3_value(byte) for byte in range(256)], dtype=np.float64)
E2M1 = np.array([*_E2M1, *(-value for value in _E2M1)], dtype=np.float64)


def to_bf16(values: np.ndarray) -> torch.Tensor:
    """Round fp32 to bf16, to nearest even, by integer arithmetic."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return torch.from_numpy(rounded.view(np.int16)).view(torch.bfloat16)


def fp8_parts(shape, generator):
    rows, columns = shape
    stored = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    stored[(stored & 0x7F) == 0x7F] = 0
    tiles = (-(-rows // TILE), -(-columns // TILE))
    scales = (0.5 + torch.rand(tiles, generator=generator)) / 500 / columns**0.5
    values = E4M3[stored.numpy()].astype(np.float32)
    spread = np.repeat(np.repeat(scales.numpy(), TILE, 0), TILE, 1)[:rows, :columns]
    parts = {"weight": stored.view(torch.float8_e4m3fn), "weight_scale_inv": scales}
    return parts, to_bf16(values * spread)


def int4_parts(shape, generator):
    rows, columns = shape
    nibbles = torch.randint(0, 16, shape, generator=generator).numpy()
    scales = ((0.5 + torch.rand((rows, columns // GROUP), generator=generator)) / 20).bfloat16()
    values = (nibbles - 8) * np.repeat(scales.double().numpy(), GROUP, 1)
    words = np.zeros((rows, columns // 8), dtype=np.uint32)
    for place in range(8):
        words |= nibbles[:, place::8].astype(np.uint32) << np.uint32(4 * place)
    parts = {
        "weight_packed": torch.from_numpy(words.view(np.int32)),
        "weight_scale": scales,
        "weight_shape": torch.tensor(shape, dtype=torch.int32),
    }
    return parts, to_bf16(values)


def mxfp4_parts(shape, generator):
    rows, columns = shape
    nibbles = torch.randint(0, 16, shape, generator=generator).numpy()
    exponents = torch.randint(119, 124, (rows, columns // 32), generator=generator)
    exponents = exponents.to(torch.uint8)
    values = E2M1[nibbles] * np.repeat(2.0 ** (exponents.numpy().astype(np.float64) - 127), 32, 1)
    packed = (nibbles[:, ::2] | nibbles[:, 1::2] << 4).astype(np.uint8)
    parts = {"weight_packed": torch.from_numpy(packed), "weight_scale": exponents}
    return parts, to_bf16(values)


PARTS = {"fp8": fp8_parts, "int4": int4_parts, "mxfp4": mxfp4_parts}


def write_twins(folder: Path, scheme: str, *, kind="deepseek_v3", prefix="", **fields):
    """Write a quantised checkpoint and its plain bf16 twin; return both folders.

    Scales lie in another file than their values, wherever there is one.
    """
    config = tiny_config(kind, dtype="bfloat16", **fields)
    plain = write_tiny_checkpoint(folder / "plain", config, num_shards=3)
    generator = torch.Generator().manual_seed(5)
    tensors = {n: t for p in sorted(plain.glob("*.safetensors")) for n, t in load_file(p).items()}
    values, scales = {}, {}
    for name, tensor in tensors.items():
        if not MATRICES[scheme].search(name):
            values[name] = tensor
            continue
        parts, tensors[name] = PARTS[scheme](tuple(tensor.shape), generator)
        stem = name.removesuffix("weight")
        (first, stored), *others = parts.items()
        values[stem + first] = stored
        scales |= {stem + leaf: part for leaf, part in others}
    write_files(plain, {"model.safetensors": tensors})
    document = json.loads((plain / "config.json").read_text())
    quantised = folder / "quantised"
    quantised.mkdir()
    values = {prefix + name: tensor for name, tensor in values.items()}
    scales = {prefix + name: tensor for name, tensor in scales.items()}
    files = {
        "model-1-of-2.safetensors": values,
        "model-2-of-2.safetensors": scales,
    }
    write_files(quantised, files)
    text = json.dumps({**document, "quantization_config": CONFIGS[scheme]})
    (quantised / "config.json").write_text(text)
    return quantised, plain


def write_files(folder: Path, files):
    """Write shards and their index in place of those that are there."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    for name, tensors in files.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    weight_map = {n: name for name, tensors in files.items() for n in tensors}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def change_part(folder: Path, name: str, change):
    """Give one stored tensor another value, or take it away where `change` returns None."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            changed = change(tensors.pop(name))
            if changed is not None:
                tensors[name] = changed
            save_file(tensors, path, metadata={"format": "pt"})
    weight_map = {n: p.name for p in folder.glob("*.safetensors") for n in load_file(p)}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
