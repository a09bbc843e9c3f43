"""Narrower weights: what fp16 and stored bf16 cost, and that integers are those that runtimes read."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from kimi_convert.errors import CheckpointError, UsageError
from kimi_convert.exporters.onnx.export import export_onnx
from kimi_convert.exporters.onnx.options import (
    MoeForm,
    OnnxOptions,
    Precision,
    Quantization,
    Target,
    WeightPlacement,
)
from kimi_convert.exporters.onnx.quantization import BLOCK, dequantize, num_blocks, quantize
from kimi_convert.exporters.onnx.session import OnnxSession
from kimi_convert.model.loading import load_model
from tests.tiny import tiny_config, write_tiny_checkpoint
from tests.unit.exporters.onnx.comparison import FP32_BOUND, error, reference_run, run_pieces

# As `validation.consistency` derives it: 4 eps sqrt(layers) between two runs in fp16.
FP16_BOUND = 4 * torch.finfo(torch.float16).eps * 2**0.5

DENSE = {"first_k_dense_replace": 4}
# Widths that blocks divide, and a rank that they do not.
SIZES = {
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
}


@pytest.fixture
def tokens():
    return np.random.default_rng(3).integers(0, 90, (2, 9))


def checkpoint_of(folder, **fields):
    return write_tiny_checkpoint(
        folder / "checkpoint", tiny_config("kimi_linear", **{**SIZES, **fields}), num_shards=1
    )


def logits_of(checkpoint, folder, tokens, **options):
    export_onnx(checkpoint, folder, options=OnnxOptions(**options))
    logits, _ = run_pieces(OnnxSession(folder, threads=1), tokens, (4, 1, 4))
    return logits


@pytest.mark.parametrize("form", [MoeForm.FUSED, MoeForm.ACTIVE])
def test_fp16_is_as_near_as_two_runs_in_fp16_are(tmp_path, tokens, form):
    checkpoint = checkpoint_of(tmp_path)
    wanted, _ = reference_run(load_model(checkpoint), tokens)
    logits = logits_of(checkpoint, tmp_path / "onnx", tokens, precision=Precision.FP16, moe=form)
    assert logits.dtype == np.float32
    assert FP32_BOUND < error(logits, wanted) <= FP16_BOUND


@pytest.mark.parametrize("target", [Target.ONNX27, Target.CUSTOM])
def test_every_target_has_fp16(tmp_path, tokens, target):
    checkpoint = checkpoint_of(tmp_path)
    wanted, _ = reference_run(load_model(checkpoint), tokens)
    logits = logits_of(
        checkpoint, tmp_path / "onnx", tokens, precision=Precision.FP16, target=target
    )
    assert error(logits, wanted) <= FP16_BOUND


def test_stored_bf16_loses_nothing_of_a_bf16_checkpoint(tmp_path, tokens):
    checkpoint = checkpoint_of(tmp_path, dtype="bfloat16")
    wide = logits_of(checkpoint, tmp_path / "wide", tokens)
    narrow = logits_of(checkpoint, tmp_path / "narrow", tokens, precision=Precision.BF16)
    assert np.array_equal(narrow, wide)
    sizes = [(tmp_path / name / "model.onnx.data").stat().st_size for name in ("wide", "narrow")]
    assert sizes[1] < 0.6 * sizes[0]


def test_a_weight_that_fp16_cannot_hold_is_named_and_leaves_nothing(tmp_path):
    checkpoint = checkpoint_of(tmp_path)
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][0, 0] = 1e6
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.o_proj"):
        export_onnx(checkpoint, tmp_path / "onnx", options=OnnxOptions(precision=Precision.FP16))
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize("width", [1, BLOCK, 75])
@pytest.mark.parametrize("bits", [4, 8])
def test_integers_are_no_worse_than_rounding_with_the_largest_weight_as_scale(width, bits):
    weight = np.random.default_rng(4).standard_normal((5, width), dtype=np.float32)
    quantized = quantize(weight, bits)
    assert quantized.packed.shape == (5, num_blocks(width), BLOCK * bits // 8)
    found = np.square(dequantize(quantized, bits, width) - weight).sum()
    most = 2 ** (bits - 1) - 1
    plain = np.zeros_like(weight)
    for start in range(0, width, BLOCK):
        block = weight[:, start : start + BLOCK]
        scale = np.abs(block).max(axis=1, keepdims=True) / most
        plain[:, start : start + BLOCK] = np.rint(block / scale) * scale
    assert found <= np.square(plain - weight).sum() * (1 + 1e-6) + 1e-9


def test_zeros_stay_zeros():
    weight = np.zeros((2, BLOCK), dtype=np.float32)
    assert not dequantize(quantize(weight, 4), 4, BLOCK).any()


def dequantized(checkpoint, model):
    """Return the reference model with the weights that the graph's integers stand for."""
    graph = onnx.load(model / "model.onnx")
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    reference = load_model(checkpoint)
    for name, parameter in reference.named_parameters():
        expert = re.fullmatch(r"layers\.(\d+)\.moe\.experts\.(gate|up|down)", name)
        if expert is None:
            continue
        at, half = int(expert[1]), {"gate": 0, "up": 1}.get(expert[2])
        stem = f"layers.{at}.experts." + ("down" if half is None else "gate_up")
        parameter.data.copy_(matrices(held, stem, parameter.shape, half))
    return held, reference


def matrices(held, stem, shape, half):
    packed, scales = held[stem + ".int4"], held[stem + ".scales"]
    rows = [
        dequantize_rows(packed[expert], scales[expert], shape[-1]) for expert in range(len(packed))
    ]
    stacked = np.stack(rows)
    return torch.from_numpy(stacked if half is None else stacked[:, half::2])


def dequantize_rows(packed, scales, width):
    bits = 8 * packed.size // scales.size // BLOCK
    blocks = packed.reshape(len(packed), scales.shape[-1], -1)
    return dequantize((blocks, scales), bits, width)


def exact(folder):
    """Let products keep fp32 activations, so that nothing but the weights is rounded."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    for node in graph.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    onnx.save(graph, folder / "exact.onnx")
    return folder / "exact.onnx"


@pytest.mark.parametrize(
    ("quantize", "fields"),
    [(Quantization.INT4, {}), (Quantization.INT8, DENSE)],
    ids=["int4 with experts", "int8, dense"],
)
def test_runtimes_read_the_integers_that_were_meant(tmp_path, tokens, quantize, fields):
    checkpoint = checkpoint_of(tmp_path, **fields)
    folder = tmp_path / "onnx"
    export_onnx(checkpoint, folder, options=OnnxOptions(quantize=quantize))
    held, reference = dequantized(checkpoint, folder)
    names = load_file(checkpoint / "model.safetensors")
    modules = dict(reference.named_parameters())
    for stored, (packed, scales) in integers_of(held).items():
        shape = names[stored].shape
        values = torch.from_numpy(dequantize_rows(packed, scales, shape[-1]))
        same = [p for p in modules.values() if p.shape == shape and torch.equal(p, names[stored])]
        assert len(same) == 1
        same[0].data.copy_(values)
    wanted, _ = reference_run(reference, tokens)
    logits, _ = run_pieces(OnnxSession(exact(folder), threads=1), tokens, (4, 1, 4))
    assert error(logits, wanted) <= FP32_BOUND
    level4, _ = run_pieces(OnnxSession(folder, threads=1), tokens, (4, 1, 4))
    assert error(level4, wanted) > FP32_BOUND  # activations in 8 bits are seen


def integers_of(held):
    """Return the integers and scales of every matrix by its name in the checkpoint."""
    found = {}
    for name, packed in held.items():
        stem = re.sub(r"(\.table)?\.int[48]$", "", name)
        if stem != name and not stem.startswith("layers."):
            found[stem] = (packed, held[re.sub(r"int[48]$", "scales", name)])
    return found


def test_sizes_that_blocks_do_not_divide_are_refused(tmp_path):
    checkpoint = checkpoint_of(tmp_path, moe_intermediate_size=24)
    with pytest.raises(CheckpointError, match="cannot be quantised") as caught:
        export_onnx(checkpoint, tmp_path / "onnx", options=OnnxOptions(quantize=Quantization.INT4))
    assert "moe_intermediate_size" in caught.value.expected
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize(
    "choices",
    [
        {"weights": WeightPlacement.INPLACE},
        {"target": Target.ONNX27},
        {"moe": MoeForm.ACTIVE},
        {"precision": Precision.FP16},
    ],
    ids=lambda choices: " ".join(choices),
)
def test_what_integers_cannot_be_combined_with_is_refused(choices):
    with pytest.raises(UsageError, match="quantize int4 cannot be had"):
        OnnxOptions(quantize=Quantization.INT4, **choices)
