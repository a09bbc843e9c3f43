"""An export holds the same values under the released names, or nothing at all."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kimi_convert.config.huggingface import read_config
from kimi_convert.errors import (
    CheckpointError,
    ConfigError,
    OutputError,
    ResourceError,
    UsageError,
)
from kimi_convert.exporters.safetensors import EXPORT_DTYPES, export_safetensors
from kimi_convert.model.loading import load_model
from kimi_convert.model.names.layout import expected_entries
from kimi_convert.validation import Check, ValidationOptions, validate_checkpoint
from tests.tiny import random_tensors, tiny_config, write_tiny_checkpoint
from tests.unit.validation.build import edit_tensors, record_hashes

HYBRID = tiny_config("kimi_linear", dtype="bfloat16")
SOURCE = tiny_config("deepseek_v3", dtype="bfloat16")
CONFIGS = {"hybrid": HYBRID, "source": SOURCE}
FP32 = ("A_log", "dt_bias")
BIAS = "e_score_correction_bias"
INTEGRITY = ValidationOptions(checks=frozenset((Check.VALUES, Check.HASHES)))


def tensors_of(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def export(source, output, **arguments):
    return export_safetensors(source, output, **arguments)


def same_bits(one, other):
    assert one.dtype == other.dtype
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@pytest.fixture(params=CONFIGS, ids=str)
def config(request):
    return CONFIGS[request.param]


@pytest.mark.parametrize("max_shard_bytes", [20_000, 100_000, 5 * 10**9])
def test_tensors_keep_their_bits_in_files_of_another_size(config, max_shard_bytes, tmp_path):
    source = write_tiny_checkpoint(tmp_path / "in", config)
    result = export(source, tmp_path / "out", max_shard_bytes=max_shard_bytes)
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert not [name for name in before if not same_bits(before[name], after[name])]
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert max(sizes) <= max_shard_bytes
    assert (len(sizes) > 1) == (max_shard_bytes < 10**6)
    assert (result.changed_dtype, result.renamed) == ((), {})
    assert result.tensors == len(after)
    assert result.nbytes == sum(tensor.nbytes for tensor in after.values())


@pytest.mark.parametrize("target", EXPORT_DTYPES)
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_new_dtype_rounds_as_torch_and_spares_what_is_fp32(config, stored, target, tmp_path):
    config = replace(config, dtype=stored)
    source = write_tiny_checkpoint(tmp_path / "in", config)
    result = export(source, tmp_path / "out", dtype=target)
    after = tensors_of(tmp_path / "out")
    dtype = getattr(torch, target)
    for name, before in random_tensors(config).items():
        wanted = torch.float32 if name.endswith(FP32) else dtype
        if name.endswith(BIAS):
            wanted = torch.promote_types(before.dtype, dtype)
        assert same_bits(after[name], before.to(wanted)), name
    changed = {name for name in after if after[name].dtype != random_tensors(config)[name].dtype}
    assert set(result.changed_dtype) == changed
    assert bool(changed) == (stored != target)
    assert result.dtype == read_config(tmp_path / "out").dtype == target


def test_correction_bias_is_not_narrowed(tmp_path):
    source = write_tiny_checkpoint(tmp_path / "in", SOURCE)

    def widen(tensors):
        for name in [name for name in tensors if name.endswith(BIAS)]:
            tensors[name] = tensors[name].float() + 7

    edit_tensors(source, widen)
    export(source, tmp_path / "out", dtype="float16")
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    biases = [name for name in before if name.endswith(BIAS)]
    assert len(biases) == 3
    assert all(same_bits(after[name], before[name]) for name in biases)


def test_fp32_parameters_stored_narrow_are_widened(tmp_path):
    source = write_tiny_checkpoint(tmp_path / "in", HYBRID)

    def narrow(tensors):
        for name in tensors:
            tensors[name] = tensors[name].bfloat16()

    edit_tensors(source, narrow)
    result = export(source, tmp_path / "out")
    after = tensors_of(tmp_path / "out")
    assert {name.rpartition(".")[2] for name in result.changed_dtype} == set(FP32)
    for name, before in tensors_of(source).items():
        assert torch.equal(after[name].double(), before.double())


def test_overflow_is_refused_by_name_and_leaves_nothing(tmp_path):
    source = write_tiny_checkpoint(tmp_path / "in", HYBRID)
    name = "model.layers.2.self_attn.k_proj.weight"

    def enlarge(tensors):
        if name in tensors:
            tensors[name][3, 4] = -65536.0

    edit_tensors(source, enlarge)
    with pytest.raises(CheckpointError, match=name) as caught:
        export(source, tmp_path / "out", dtype="float16")
    assert caught.value.exit_code == 3
    assert caught.value.expected == "at most 65504 in size"
    assert not (tmp_path / "out").exists()
    export(source, tmp_path / "out", dtype="float32")


def test_largest_fp16_value_is_not_an_overflow(tmp_path):
    source = write_tiny_checkpoint(tmp_path / "in", replace(HYBRID, dtype="float32"))

    def enlarge(tensors):
        if "lm_head.weight" in tensors:
            tensors["lm_head.weight"][0, :2] = torch.tensor([65519.0, -65504.0])

    edit_tensors(source, enlarge)
    export(source, tmp_path / "out", dtype="float16")
    head = tensors_of(tmp_path / "out")["lm_head.weight"]
    assert head[0, :2].tolist() == [65504.0, -65504.0]


@pytest.mark.parametrize("dtype", [None, "float16", "float32"])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
def test_values_that_are_not_finite_are_refused_by_name(value, dtype, tmp_path):
    source = write_tiny_checkpoint(tmp_path / "in", HYBRID)

    def spoil(tensors):
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"][0] = value

    edit_tensors(source, spoil)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*not finite"):
        export(source, tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_tensors_larger_than_one_chunk_are_converted_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "kimi_convert.checkpoints.reader.CheckpointReader.chunks.__kwdefaults__",
        {"chunk_bytes": 64},
    )
    source = write_tiny_checkpoint(tmp_path / "in", HYBRID)
    export(source, tmp_path / "out", dtype="float32")
    after = tensors_of(tmp_path / "out")
    for name, before in random_tensors(HYBRID).items():
        assert torch.equal(after[name], before.float())


@torch.inference_mode()
def test_export_computes_the_same_logits(config, tmp_path):
    source = write_tiny_checkpoint(tmp_path / "in", config)
    export(source, tmp_path / "out", dtype="float32", max_shard_bytes=50_000)
    tokens = torch.arange(40)[None]
    assert torch.equal(load_model(tmp_path / "out")(tokens), load_model(source)(tokens))


def test_same_call_gives_the_same_bytes(tmp_path):
    source = write_tiny_checkpoint(tmp_path / "in", HYBRID)
    record_hashes(source)
    for name in ("one", "two"):
        export(source, tmp_path / name, dtype="float16", max_shard_bytes=40_000)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_files_do_not_depend_on_how_the_source_was_cut(tmp_path):
    for shards in (1, 3):
        source = write_tiny_checkpoint(tmp_path / f"in{shards}", HYBRID, num_shards=shards)
        export(source, tmp_path / f"out{shards}", max_shard_bytes=40_000)
    assert files_of(tmp_path / "out1") == files_of(tmp_path / "out3")


def test_names_that_transformers_writes_become_the_released_ones(tmp_path):
    source = write_tiny_checkpoint(tmp_path / "in", HYBRID, num_shards=1)
    before = tensors_of(source)
    renamed = {
        f"model.layers.0.block_sparse_moe.{leaf}.weight": f"model.layers.0.mlp.{leaf}.weight"
        for leaf in ("gate_proj", "up_proj", "down_proj")
    }

    def rename(tensors):
        for alias, name in renamed.items():
            tensors[alias] = tensors.pop(name)

    edit_tensors(source, rename)
    result = export(source, tmp_path / "out")
    after = tensors_of(tmp_path / "out")
    assert result.renamed == renamed
    assert after.keys() == {entry.name for entry in expected_entries(HYBRID)}
    assert all(same_bits(after[name], before[name]) for name in after)


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_config_keeps_every_field_and_states_the_dtype(config, tmp_path):
    source = write_tiny_checkpoint(tmp_path / "in", config)
    odd = {"torch_dtype": "bfloat16", "auto_map": {"a": "b"}, "é": [1, {"x": None}], "big": 2**70}
    edit_config(source, **odd)
    before = json.loads((source / "config.json").read_text())
    export(source, tmp_path / "same")
    export(source, tmp_path / "fp16", dtype="float16")
    same, fp16 = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("same", "fp16"))
    assert same == before
    assert fp16 == before | {"dtype": "float16", "torch_dtype": "float16"}


def test_config_gains_the_fields_of_the_released_format(tmp_path):
    source = write_tiny_checkpoint(tmp_path / "in", HYBRID)
    path = source / "config.json"
    document = json.loads(path.read_text())
    linear = document.pop("linear_attn_config")
    native = {
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "linear_num_heads": linear["num_heads"],
        "linear_head_dim": linear["head_dim"],
        "linear_conv_kernel_dim": linear["short_conv_kernel_size"],
    }
    path.write_text(json.dumps(document | native))
    export(source, tmp_path / "out")
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert after == document | native | {"linear_attn_config": linear}


def test_tokenizer_and_terms_are_carried_and_code_is_not(tmp_path):
    source = write_tiny_checkpoint(tmp_path / "in", HYBRID)
    carried = {"tokenizer.json", "generation_config.json", "chat_template.jinja", "LICENSE"}
    for name in carried | {"modeling_kimi.py", "README.md", "pytorch_model.bin", "notes.txt"}:
        (source / name).write_bytes(name.encode())
    result = export(source, tmp_path / "out")
    after = files_of(tmp_path / "out")
    own = {"config.json", "model.safetensors.index.json"}
    shards = {name for name in after if name.endswith(".safetensors")}
    assert after.keys() == carried | own | shards
    assert all(after[name] == name.encode() for name in carried)
    assert {file.name for file in result.files} == after.keys()


def test_memory_is_told_and_checked_before_anything_is_written(tmp_path, monkeypatch):
    source = write_tiny_checkpoint(tmp_path / "in", HYBRID)
    told = []
    monkeypatch.setattr("kimi_convert.conversion.memory.free_memory_bytes", lambda: 10**6)
    with pytest.raises(ResourceError, match="not enough memory for the export"):
        export(source, tmp_path / "out", on_memory=told.append)
    assert not (tmp_path / "out").exists()
    (planned,) = told
    monkeypatch.setattr("kimi_convert.conversion.memory.free_memory_bytes", lambda: planned)
    export(source, tmp_path / "out")


def test_result_hashes_what_is_there(tmp_path):
    source = write_tiny_checkpoint(tmp_path / "in", HYBRID)
    result = export(source, tmp_path / "out", max_shard_bytes=60_000)
    document = json.loads(json.dumps(result.to_json()))
    assert document["output"] == str(tmp_path / "out")
    contents = files_of(tmp_path / "out")
    assert {name: file["size"] for name, file in document["files"].items()} == {
        name: len(content) for name, content in contents.items()
    }
    assert {name: file.get("sha256") for name, file in document["files"].items()} == {
        name: None if name.endswith(".safetensors") else hashlib.sha256(content).hexdigest()
        for name, content in contents.items()
    }
    assert sum("header_sha256" in file for file in document["files"].values()) == 5


def test_conversion_record_is_carried_with_the_hashes_of_the_export(tmp_path):
    source = write_tiny_checkpoint(tmp_path / "in", replace(HYBRID, dtype="float32"))
    record = record_hashes(source)
    export(source, tmp_path / "out", dtype="bfloat16", max_shard_bytes=60_000)
    after = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert {name: after[name] for name in record} == record
    changes = {name: after["export"][name] for name in ("dtype", "max_shard_bytes", "renamed")}
    assert changes == {"dtype": "bfloat16", "max_shard_bytes": 60_000, "renamed": {}}
    report = validate_checkpoint(tmp_path / "out", options=INTEGRITY)
    assert report.findings == ()
    assert report.integrity.tensors_hashed == report.integrity.tensors
    assert report.integrity.files_hashed == len(files_of(tmp_path / "out")) - 1
    edit_tensors(tmp_path / "out", lambda tensors: next(iter(tensors.values())).add_(1))
    assert not validate_checkpoint(tmp_path / "out", options=INTEGRITY).passed


def test_checkpoint_without_a_record_is_exported_without_one(tmp_path):
    export(write_tiny_checkpoint(tmp_path / "in", HYBRID), tmp_path / "out")
    assert not (tmp_path / "out" / "conversion.json").exists()


def test_tensors_that_nothing_reads_go_along_unchanged(tmp_path):
    source = write_tiny_checkpoint(tmp_path / "in", SOURCE, num_shards=1)
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    extra = {name: torch.rand(4)}
    save_file(tensors_of(source) | extra, source / "model.safetensors", metadata={"format": "pt"})
    result = export(source, tmp_path / "out", dtype="float16")
    after = tensors_of(tmp_path / "out")
    assert same_bits(after[name], extra[name])
    assert name not in result.changed_dtype


def test_files_say_that_they_hold_torch_tensors(tmp_path):
    export(write_tiny_checkpoint(tmp_path / "in", HYBRID), tmp_path / "out")
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, framework="pt") as shard:
            assert shard.metadata() == {"format": "pt"}


def missing_tensor(folder):
    edit_tensors(folder, lambda tensors: tensors.pop("model.norm.weight", None))


def missing_config(folder):
    (folder / "config.json").unlink()


def quantised(folder):
    edit_config(folder, quantization_config={"quant_method": "awq"})


def broken_record(folder):
    (folder / "conversion.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (missing_tensor, CheckpointError),
        (missing_config, ConfigError),
        (quantised, ConfigError),
        (broken_record, CheckpointError),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(damage, error, tmp_path):
    source = write_tiny_checkpoint(tmp_path / "in", HYBRID, num_shards=1)
    damage(source)
    with pytest.raises(error) as caught:
        export(source, tmp_path / "out")
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["BF16", "float64", "int8", ""])
def test_unknown_dtype_is_a_usage_error(dtype, tmp_path):
    source = write_tiny_checkpoint(tmp_path / "in", HYBRID)
    with pytest.raises(UsageError) as caught:
        export(source, tmp_path / "out", dtype=dtype)
    assert caught.value.exit_code == 2


def test_output_must_be_empty_and_apart(tmp_path):
    source = write_tiny_checkpoint(tmp_path / "in", HYBRID)
    before = files_of(source)
    taken = shutil.copytree(source, tmp_path / "taken")
    for output in (source, source / "inside", taken):
        with pytest.raises(OutputError):
            export(source, output)
    assert files_of(source) == files_of(taken) == before


def test_progress_counts_the_bytes_that_are_read(tmp_path):
    source = write_tiny_checkpoint(tmp_path / "in", HYBRID)
    events = []
    export(source, tmp_path / "out", dtype="float32", on_progress=events.append)
    read = sum(tensor.nbytes for tensor in tensors_of(source).values())
    assert (events[0].done, events[0].total) == (0, read)
    assert events[-1].done == events[-1].total == read
