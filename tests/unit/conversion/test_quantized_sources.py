"""Quantised sources give the bytes that their plain twins give; damaged ones are refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from kimi_convert.config.recipe import Recipe
from kimi_convert.conversion import plan_conversion
from kimi_convert.conversion.engine import convert_checkpoint
from kimi_convert.conversion.rules import Op
from kimi_convert.errors import CheckpointError, ConfigError
from kimi_convert.exporters.safetensors import export_safetensors
from kimi_convert.model.loading import load_model
from tests.quantized import CONFIGS, change_part, write_files, write_twins

EXPERT = "model.layers.2.mlp.experts.3.up_proj."
MTP_LAYER = "model.layers.4."
SIZES = {"fp8": {}, "int4": {}, "mxfp4": {"moe_intermediate_size": 32}}


def converted(source, output):
    """Return the weights' files, and config.json."""
    convert_checkpoint(source, output, max_shard_bytes=60_000)
    files = {path.name: path.read_bytes() for path in output.glob("*.safetensors")}
    assert len(files) >= 4
    return files, json.loads((output / "config.json").read_text())


def assert_twins(tmp_path, quantised, plain):
    ours = converted(quantised, tmp_path / "from-quantised")
    assert ours == converted(plain, tmp_path / "from-plain")
    assert "quantization_config" not in ours[1]


def stored(folder):
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


@pytest.mark.parametrize("scheme", CONFIGS)
def test_quantised_source_gives_the_bytes_of_its_plain_twin(scheme, tmp_path):
    assert_twins(tmp_path, *write_twins(tmp_path, scheme, **SIZES[scheme]))


def test_k2_shaped_source(tmp_path):
    quantised, plain = write_twins(
        tmp_path, "fp8", kind="kimi_k2", q_lora_rank=20, first_k_dense_replace=1
    )
    tensors = stored(quantised)
    for layer_idx in range(4):
        name = f"model.layers.{layer_idx}.self_attn.rotary_emb.inv_freq"
        tensors[name] = torch.full((8,), float("nan")).bfloat16()
    write_files(quantised, {"model.safetensors": tensors})
    assert_twins(tmp_path, quantised, plain)
    plan = plan_conversion(quantised, Recipe())
    assert {one.why for one in plan.dropped} == {
        "rotary frequencies are recomputed from config.json"
    }


def test_v3_shaped_source_with_its_mtp_layer(tmp_path):
    quantised, plain = write_twins(
        tmp_path,
        "fp8",
        q_lora_rank=20,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=3,
        num_nextn_predict_layers=1,
    )
    tensors = stored(quantised)
    again = {
        name.replace("model.layers.3.", MTP_LAYER): tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith("model.layers.3.")
    }
    again |= {
        MTP_LAYER + "enorm.weight": torch.ones(32).bfloat16(),
        MTP_LAYER + "hnorm.weight": torch.ones(32).bfloat16(),
        MTP_LAYER + "eh_proj.weight": torch.ones(32, 64).bfloat16(),
        MTP_LAYER + "embed_tokens.weight": torch.ones(96, 32).bfloat16(),
        MTP_LAYER + "shared_head.norm.weight": torch.ones(32).bfloat16(),
        MTP_LAYER + "shared_head.head.weight": torch.ones(96, 32).bfloat16(),
    }
    write_files(quantised, {"model.safetensors": {**tensors, **again}})
    assert_twins(tmp_path, quantised, plain)
    plan = plan_conversion(quantised, Recipe())
    assert {one.name for one in plan.dropped} == set(again)
    assert {one.why for one in plan.dropped} == {
        "multi-token-prediction layers have no place in the target format"
    }


@pytest.mark.parametrize("inside", [True, False], ids=["in-text-config", "beside-it"])
def test_k25_shaped_source(inside, tmp_path):
    quantised, plain = write_twins(tmp_path, "int4", prefix="language_model.", q_lora_rank=20)
    tensors = stored(quantised)
    others = ("vision_tower.encoder.0.weight", "mm_projector.proj.0.weight")
    tensors |= {name: torch.full((2, 2), float("nan")) for name in others}
    write_files(quantised, {"model.safetensors": tensors})
    text = json.loads((quantised / "config.json").read_text())
    outer = {"model_type": "kimi_k25", "architectures": ["KimiK25ForConditionalGeneration"]}
    if not inside:
        outer["quantization_config"] = text.pop("quantization_config")
    (quantised / "config.json").write_text(json.dumps({**outer, "text_config": text}))
    assert_twins(tmp_path, quantised, plain)
    plan = plan_conversion(quantised, Recipe())
    assert sorted(one.name for one in plan.dropped) == sorted(others)
    assert all("no image encoder" in one.why for one in plan.dropped)


def test_text_model_nested_under_model(tmp_path):
    quantised, plain = write_twins(tmp_path, "int4")
    tensors = {
        name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in stored(quantised).items()
    }
    write_files(quantised, {"model.safetensors": tensors})
    assert_twins(tmp_path, quantised, plain)


def test_quantised_model_runs_as_its_plain_twin(tmp_path):
    quantised, plain = write_twins(tmp_path, "fp8")
    tokens = torch.arange(12)[None]
    assert torch.equal(load_model(quantised)(tokens), load_model(plain)(tokens))


def test_export_of_a_quantised_checkpoint_is_plain(tmp_path):
    quantised, plain = write_twins(tmp_path, "int4")
    for name, folder in (("a", quantised), ("b", plain)):
        export_safetensors(folder, tmp_path / name)
    one, other = stored(tmp_path / "a"), stored(tmp_path / "b")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    documents = [json.loads((tmp_path / name / "config.json").read_text()) for name in "ab"]
    assert documents[0] == documents[1]


def test_provenance_names_every_stored_part(tmp_path):
    quantised, _ = write_twins(tmp_path, "int4")
    convert_checkpoint(quantised, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    entry = record["tensors"]["model.layers.2.block_sparse_moe.experts.3.w3.weight"]
    assert entry["op"] == "dequantize"
    parts = ("weight_packed", "weight_scale", "weight_shape")
    assert entry["sources"] == [EXPERT + part for part in parts]
    assert not any("packed" in name for name in record["copied_source_sha256"])
    assert "model.norm.weight" in record["copied_source_sha256"]


def test_plan_counts_stored_bytes(tmp_path):
    quantised, _ = write_twins(tmp_path, "fp8")
    plan = plan_conversion(quantised, Recipe())
    assert plan.read_bytes == sum(tensor.nbytes for tensor in stored(quantised).values())
    assert {task.op for task in plan.tasks} >= {Op.COPY, Op.DEQUANTIZE, Op.FOLD_KEY}


def spoil(value):
    def change(tensor):
        tensor.view(-1)[-1] = value
        return tensor

    return change


def nan_value(tensor):
    tensor.view(torch.uint8).view(-1)[-1] = 0x7F
    return tensor


DAMAGES = {
    "scale-missing": ("fp8", "weight_scale_inv", lambda _: None, "lacks"),
    "scale-too-small": ("fp8", "weight_scale_inv", lambda t: t[:1].clone(), "not valid"),
    "scale-of-another-dtype": ("fp8", "weight_scale_inv", lambda t: t.half(), "not valid"),
    "scale-nan": ("fp8", "weight_scale_inv", spoil(float("nan")), "not finite"),
    "scale-inf": ("fp8", "weight_scale_inv", spoil(float("inf")), "not finite"),
    "value-nan": ("fp8", "weight", nan_value, "not finite"),
    "product-overflows": ("fp8", "weight_scale_inv", spoil(3e38), "not finite"),
    "int4-scale-nan": ("int4", "weight_scale", spoil(float("nan")), "not finite"),
    "int4-shape-wrong": ("int4", "weight_shape", spoil(40), "contradicts"),
    "int4-shape-missing": ("int4", "weight_shape", lambda _: None, "lacks"),
    "int4-shape-of-another-kind": ("int4", "weight_shape", lambda t: t.float(), "not valid"),
    "mxfp4-scale-nan": ("mxfp4", "weight_scale", spoil(255), "not finite"),
    "mxfp4-scale-missing": ("mxfp4", "weight_scale", lambda _: None, "lacks"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_part_is_refused_by_name_and_leaves_nothing(damage, tmp_path):
    scheme, part, change, message = DAMAGES[damage]
    quantised, _ = write_twins(tmp_path, scheme, **SIZES[scheme])
    change_part(quantised, EXPERT + part, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        convert_checkpoint(quantised, tmp_path / "out")
    assert EXPERT in caught.value.message
    assert str(quantised) in caught.value.where
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()


def test_shard_of_scales_that_is_missing_is_refused(tmp_path):
    quantised, _ = write_twins(tmp_path, "fp8")
    (quantised / "model-2-of-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        convert_checkpoint(quantised, tmp_path / "out")


def test_scale_without_its_weight_is_unknown(tmp_path):
    quantised, _ = write_twins(tmp_path, "fp8")
    change_part(quantised, EXPERT + "weight", lambda t: t.float().bfloat16())
    with pytest.raises(CheckpointError, match="asks for") as caught:
        plan_conversion(quantised, Recipe())
    assert f"1 unknown: '{EXPERT}weight_scale_inv'" in caught.value.found


def test_float8_without_a_word_in_the_config_is_refused(tmp_path):
    quantised, _ = write_twins(tmp_path, "fp8")
    document = json.loads((quantised / "config.json").read_text())
    del document["quantization_config"]
    (quantised / "config.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError):
        plan_conversion(quantised, Recipe())


@pytest.mark.parametrize(
    "stated",
    [
        {"quant_method": "awq"},
        {"quant_method": "fp8"},
        {"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [128, 128]},
        {"quant_method": "fp8", "weight_block_size": [0, 128]},
        {"quant_method": "compressed-tensors"},
        {**CONFIGS["int4"], "format": "marlin-24"},
        {**CONFIGS["int4"], "config_groups": {"a": {}, "b": {}}},
        {**CONFIGS["int4"], "config_groups": {"a": {"weights": {"type": "int"}}}},
    ],
)
def test_other_quantisation_is_refused_by_name(stated, tmp_path):
    quantised, _ = write_twins(tmp_path, "fp8")
    document = json.loads((quantised / "config.json").read_text())
    document["quantization_config"] = stated
    (quantised / "config.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="quanti") as caught:
        plan_conversion(quantised, Recipe())
    assert caught.value.where
