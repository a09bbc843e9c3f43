"""FP8 outputs and MTP layers that are kept: the bytes of the source where it has them."""

from __future__ import annotations

import json

import pytest
import torch

from kimi_convert.checkpoints.encoding import encode_fp8
from kimi_convert.config.huggingface import read_config
from kimi_convert.config.output_format import MtpLayers, OutputFormat, TargetDtype
from kimi_convert.config.recipe import Recipe
from kimi_convert.conversion import plan_conversion
from kimi_convert.conversion.engine import convert_checkpoint
from kimi_convert.conversion.rules import Op
from kimi_convert.errors import CheckpointError
from kimi_convert.exporters.safetensors import export_safetensors
from kimi_convert.model.loading import load_model
from kimi_convert.validation import Check, ValidationOptions, validate_checkpoint
from tests import quantized
from tests.quantized import E4M3, change_part, write_twins
from tests.tiny import tiny_config, write_tiny_checkpoint
from tests.unit.conversion.test_engine import raw_tensors, released_name
from tests.unit.conversion.test_quantized_sources import stored

FP8 = OutputFormat(dtype=TargetDtype.FP8)
KEEP = OutputFormat(mtp=MtpLayers.KEEP)
TOKENS = torch.arange(12)[None]
WIDE = {"hidden_size": 160, "intermediate_size": 144, "moe_intermediate_size": 136}


@pytest.mark.parametrize("shape", [(128, 128), (200, 300), (1, 1), (130, 128)])
def test_encoding_follows_the_formula(shape):
    rows = torch.randn(shape) * 3
    values, scales = encode_fp8(rows)
    assert scales.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    wide = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
    block = rows[:128, :128]
    assert scales[0, 0] == block.abs().max() / 448
    found = torch.from_numpy(E4M3[values.view(torch.uint8).numpy()]).float()
    grid = torch.from_numpy(E4M3[:0x7F]).float()  # every size that there is
    nearest = grid[(rows.abs() / wide)[..., None].sub(grid).abs().argmin(-1)]
    assert torch.equal(found.abs(), nearest)
    assert ((found * wide - rows).abs() <= rows.abs() / 16 + wide * 2**-10).all()


def test_zeros_are_kept_with_scale_one():
    values, scales = encode_fp8(torch.zeros(4, 4))
    assert scales.item() == 1
    assert not values.float().any()


@pytest.fixture
def fp8_twins(tmp_path, monkeypatch):
    """An FP8 source with blocks as they are released."""
    monkeypatch.setattr(quantized, "TILE", 128)
    monkeypatch.setitem(quantized.FP8, "weight_block_size", [128, 128])
    return write_twins(tmp_path, "fp8", **WIDE)


def test_fp8_source_keeps_its_bytes_and_the_model_its_numbers(fp8_twins, tmp_path):
    source, plain = fp8_twins
    convert_checkpoint(source, tmp_path / "fp8", output_format=FP8)
    convert_checkpoint(plain, tmp_path / "bf16")
    theirs, ours = raw_tensors(source), raw_tensors(tmp_path / "fp8")
    quantised = [name for name in theirs if name.endswith("_scale_inv") and ".mlp." in name]
    assert len(quantised) == 3 + 3 * 3 * (8 + 1)
    for name in quantised:
        for one in (name, name.removesuffix("_scale_inv")):
            assert ours[released_name(one)] == theirs[one]
    assert not any(".self_attn." in name for name in ours if name.endswith("_scale_inv"))
    assert torch.equal(load_model(tmp_path / "fp8")(TOKENS), load_model(tmp_path / "bf16")(TOKENS))
    quantization = json.loads((tmp_path / "fp8" / "config.json").read_text())[
        "quantization_config"
    ]
    assert quantization["quant_method"] == "fp8"
    assert quantization["weight_block_size"] == [128, 128]
    assert "model.layers.0.self_attn" in quantization["modules_to_not_convert"]


def test_plain_source_is_quantised_and_valid(tmp_path):
    config = tiny_config("deepseek_v3", dtype="bfloat16", **WIDE)
    source = write_tiny_checkpoint(tmp_path / "in", config)
    for output_format in (FP8, OutputFormat()):
        name = output_format.dtype
        convert_checkpoint(source, tmp_path / name, output_format=output_format)
    exact, rounded = (load_model(tmp_path / name)(TOKENS) for name in ("source", "fp8"))
    assert 0 < (exact - rounded).abs().max() < 0.2 * exact.abs().max()
    report = validate_checkpoint(
        tmp_path / "fp8",
        options=ValidationOptions(checks=frozenset({Check.VALUES, Check.HASHES})),
    )
    assert report.passed
    name = "model.layers.2.block_sparse_moe.experts.3.w3.weight"
    values, scales = encode_fp8(stored(source)["model.layers.2.mlp.experts.3.up_proj.weight"])
    ours = stored(tmp_path / "fp8")
    assert torch.equal(ours[name].view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(ours[name + "_scale_inv"], scales)


def test_fp8_hybrid_is_exported_plain(fp8_twins, tmp_path):
    source, plain = fp8_twins
    convert_checkpoint(source, tmp_path / "fp8", output_format=FP8)
    convert_checkpoint(plain, tmp_path / "bf16")
    export_safetensors(tmp_path / "fp8", tmp_path / "again")
    again, expected = stored(tmp_path / "again"), stored(tmp_path / "bf16")
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[name], expected[name]) for name in again)
    assert read_config(tmp_path / "again").quantization is None


@pytest.mark.parametrize("scheme", ["int4", "fp8"])
def test_other_quantised_sources_become_fp8_too(scheme, tmp_path):
    source, plain = write_twins(tmp_path, scheme, **WIDE)
    for name, folder in (("a", source), ("b", plain)):
        convert_checkpoint(folder, tmp_path / name, output_format=FP8)
    assert raw_tensors(tmp_path / "a") == raw_tensors(tmp_path / "b")


def test_nan_in_fp8_that_would_be_copied_is_refused(fp8_twins, tmp_path):
    source, _ = fp8_twins

    def spoil(tensor):
        tensor.view(torch.uint8).view(-1)[-1] = 0xFF
        return tensor

    change_part(source, "model.layers.2.mlp.experts.3.up_proj.weight", spoil)
    with pytest.raises(CheckpointError, match="not finite"):
        convert_checkpoint(source, tmp_path / "out", output_format=FP8)


def mtp_source(folder, scheme="fp8"):
    """Write a source whose MTP layer is a copy of its last one, quantised as it is."""
    source, plain = write_twins(folder, scheme, num_nextn_predict_layers=1)
    for one in (source, plain):
        tensors = stored(one)
        again = {
            name.replace("model.layers.3.", "model.layers.4."): tensor.clone()
            for name, tensor in tensors.items()
            if name.startswith("model.layers.3.")
        }
        again["model.layers.4.eh_proj.weight"] = torch.ones(32, 64).bfloat16()
        again["model.layers.4.embed_tokens.weight"] = torch.ones(96, 32).bfloat16()
        quantized.write_files(one, {"model.safetensors": {**tensors, **again}})
    return source, plain


def test_mtp_layers_are_kept_under_the_names_of_the_format(tmp_path):
    source, plain = mtp_source(tmp_path)
    for name, folder in (("a", source), ("b", plain)):
        convert_checkpoint(folder, tmp_path / name, output_format=KEEP)
    ours, theirs = stored(tmp_path / "a"), stored(plain)
    assert raw_tensors(tmp_path / "a") == raw_tensors(tmp_path / "b")
    kept = {name for name in ours if name.startswith("model.layers.4.")}
    assert kept == {released_name(n) for n in theirs if n.startswith("model.layers.4.")}
    assert torch.equal(
        ours["model.layers.4.block_sparse_moe.experts.1.w2.weight"],
        theirs["model.layers.4.mlp.experts.1.down_proj.weight"],
    )
    assert read_config(tmp_path / "a").num_mtp_layers == 1
    assert plan_conversion(source, Recipe(), output_format=KEEP).dropped == ()
    convert_checkpoint(source, tmp_path / "dropped")
    assert torch.equal(
        load_model(tmp_path / "a")(TOKENS), load_model(tmp_path / "dropped")(TOKENS)
    )


def test_mtp_layers_are_kept_in_fp8_too(tmp_path):
    source, _ = mtp_source(tmp_path)
    both = OutputFormat(dtype=TargetDtype.FP8, mtp=MtpLayers.KEEP)
    convert_checkpoint(source, tmp_path / "out", output_format=both)
    name = "model.layers.4.block_sparse_moe.experts.1.w2.weight"
    assert stored(tmp_path / "out")[name].dtype == torch.float8_e4m3fn
    load_model(tmp_path / "out")


def test_source_without_mtp_layers_has_none_to_keep(tmp_path):
    source = write_tiny_checkpoint(tmp_path / "in", tiny_config("deepseek_v3"))
    plan = plan_conversion(source, Recipe(), output_format=KEEP)
    assert plan.tasks == plan_conversion(source, Recipe()).tasks
    assert {task.op for task in plan.tasks} >= {Op.COPY}
