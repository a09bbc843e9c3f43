"""Damage of every kind is found and named; a sound checkpoint has no findings."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from kimi_convert.checkpoints.finite import find_non_finite
from kimi_convert.checkpoints.index import open_index
from kimi_convert.config.huggingface import config_to_json
from kimi_convert.errors import CheckpointError
from kimi_convert.model.names.layout import expected_entries
from kimi_convert.validation.integrity import check_integrity
from kimi_convert.validation.options import Check
from kimi_convert.validation.report import Severity
from tests.tiny import write_tiny_checkpoint
from tests.unit.validation.build import (
    ALL,
    HYBRID,
    NOTHING,
    TEACHER,
    edit_tensors,
    record_hashes,
    silent,
    write_hybrid,
    write_json,
)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
VALUES = frozenset((Check.VALUES,))
HASHES = frozenset((Check.HASHES,))
FIRST_SHARD = "model-00001-of-00002.safetensors"
LAST_SHARD = "model-00002-of-00002.safetensors"


def check(folder, checks=ALL, config=HYBRID):
    return check_integrity(folder, config, checks=checks, on_progress=silent)


def findings(folder, checks=ALL, config=HYBRID):
    return check(folder, checks, config)[1]


def plant(folder, name, value, at=0):
    """Overwrite one element of a tensor in its file, and return the old bytes' place."""
    spec = open_index(folder).spec(name)
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[spec.dtype]
    new = torch.tensor([value], dtype=dtype).view(torch.uint8).numpy().tobytes()
    path, place = folder / spec.shard, spec.start + at * len(new)
    return path, place, overwrite(path, place, new)


def overwrite(path, place, new):
    with path.open("r+b") as file:
        file.seek(place)
        old = file.read(len(new))
        file.seek(place)
        file.write(new)
    return old


@pytest.mark.parametrize("num_shards", [1, 2], ids=["one-file", "two-files"])
@pytest.mark.parametrize("config", [HYBRID, TEACHER], ids=["hybrid", "source"])
def test_sound_checkpoint_has_no_findings(config, num_shards, tmp_path):
    write_tiny_checkpoint(tmp_path, config, num_shards=num_shards)
    record = record_hashes(tmp_path)
    report, found = check(tmp_path, config=config)
    assert found == ()
    assert report.tensors == report.values_scanned == len(expected_entries(config))
    assert report.tensors_hashed == report.tensors == len(record["tensors"])
    assert report.files_hashed == len(record["files"])
    assert report.hashes_from == ("conversion.json",)


def test_nan_in_any_tensor_is_found_and_named(tmp_path):
    write_hybrid(tmp_path)
    for entry in expected_entries(HYBRID):
        count = math.prod(entry.shape)
        path, place, old = plant(tmp_path, entry.name, math.nan, at=count - 1)
        (found,) = findings(tmp_path, VALUES)
        overwrite(path, place, old)
        assert (found.where, found.severity) == (entry.name, Severity.ERROR)
        assert found.found.startswith(f"1 NaN and 0 Inf of {count}")
    assert findings(tmp_path, VALUES) == ()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("value", "said"),
    [
        pytest.param(math.nan, "1 NaN and 0 Inf", id="nan"),
        pytest.param(math.inf, "0 NaN and 1 Inf", id="inf"),
        pytest.param(-math.inf, "0 NaN and 1 Inf", id="minus-inf"),
    ],
)
def test_value_is_described_in_every_dtype(value, said, dtype, tmp_path):
    config = replace(HYBRID, dtype=dtype)
    write_tiny_checkpoint(tmp_path, config)
    plant(tmp_path, "model.embed_tokens.weight", value, at=7 * 32 + 5)
    (found,) = findings(tmp_path, VALUES, config)
    assert found.found == f"{said} of {300 * 32}, the first at [7, 5]"


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_every_bit_pattern_is_judged_as_torch_judges_it(dtype):
    torch_dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    stored = (patterns << 16 if dtype == "F32" else patterns.to(torch.int16)).contiguous()
    values = stored.view(torch_dtype)
    chunk = memoryview(bytearray(stored.view(torch.uint8).numpy().tobytes()))
    num_nan, num_inf, first = find_non_finite(chunk, dtype)
    assert (num_nan, num_inf) == (int(values.isnan().sum()), int(values.isinf().sum()))
    assert first == int((~values.isfinite()).nonzero()[0])
    finite = values[values.isfinite()].contiguous()
    chunk = memoryview(bytearray(finite.view(torch.uint8).numpy().tobytes()))
    assert find_non_finite(chunk, dtype) is None


def test_values_beyond_the_first_chunk_are_counted_and_placed(tmp_path, monkeypatch):
    write_hybrid(tmp_path)
    name = "model.embed_tokens.weight"
    for at in (40 * 32, 250 * 32 + 31):
        plant(tmp_path, name, math.inf, at=at)
    plant(tmp_path, name, math.nan, at=299 * 32)
    monkeypatch.setattr(
        "kimi_convert.checkpoints.reader.CheckpointReader.chunks.__kwdefaults__",
        {"chunk_bytes": 4096},
    )
    (found,) = findings(tmp_path, VALUES)
    assert found.found == f"1 NaN and 2 Inf of {300 * 32}, the first at [40, 0]"


def test_values_and_hashes_are_looked_at_only_where_asked_for(tmp_path):
    write_hybrid(tmp_path)
    record_hashes(tmp_path)
    plant(tmp_path, "model.norm.weight", math.nan)
    report, found = check(tmp_path, NOTHING)
    assert found == ()
    assert (report.values_scanned, report.files_hashed, report.tensors_hashed) == (0, 0, 0)


def test_flipped_bit_names_the_file_and_the_tensor(tmp_path):
    write_hybrid(tmp_path)
    record = record_hashes(tmp_path)
    name = "model.layers.3.self_attn.kv_b_proj.weight"
    spec = open_index(tmp_path).spec(name)
    data = bytearray((tmp_path / spec.shard).read_bytes())
    data[spec.start + 17] ^= 1
    (tmp_path / spec.shard).write_bytes(data)
    of_file, of_tensor = findings(tmp_path, HASHES)
    assert (of_file.where, of_tensor.where) == (spec.shard, name)
    assert of_file.expected == record["files"][spec.shard]["sha256"]
    assert of_tensor.expected == record["tensors"][name]["sha256"]
    assert of_file.found != of_file.expected
    assert of_tensor.found != of_tensor.expected
    assert {of_file.severity, of_tensor.severity} == {Severity.ERROR}


def test_header_of_a_file_is_held_against_its_own_hash(tmp_path):
    write_hybrid(tmp_path)
    record = record_hashes(tmp_path)
    spec = open_index(tmp_path).spec("model.norm.weight")
    path = tmp_path / spec.shard
    header_bytes = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    digest = hashlib.sha256(path.read_bytes()[:header_bytes]).hexdigest()
    record["files"][spec.shard] = {"header_sha256": digest, "size": path.stat().st_size}
    write_json(tmp_path / "conversion.json", record)
    assert findings(tmp_path, HASHES) == ()

    data = bytearray(path.read_bytes())
    data[spec.start] ^= 1
    path.write_bytes(data)
    (of_tensor,) = findings(tmp_path, HASHES)
    assert of_tensor.where == "model.norm.weight"

    data[spec.start] ^= 1
    path.write_bytes(data.replace(b'"pt"', b'"np"'))
    (of_header,) = findings(tmp_path, HASHES)
    assert (of_header.where, of_header.expected) == (spec.shard, digest)


@pytest.mark.parametrize(
    ("section", "name"),
    [("files", "config.json"), ("files", FIRST_SHARD), ("tensors", "model.norm.weight")],
)
def test_wrong_recorded_hash_is_found(section, name, tmp_path):
    write_hybrid(tmp_path)
    record = record_hashes(tmp_path)
    right = record[section][name]["sha256"]
    record[section][name]["sha256"] = "0" * 64
    write_json(tmp_path / "conversion.json", record)
    (found,) = findings(tmp_path, HASHES)
    assert (found.where, found.expected, found.found) == (name, "0" * 64, right)


def test_file_of_another_size_is_not_read(tmp_path):
    write_hybrid(tmp_path)
    record = record_hashes(tmp_path)
    size = record["files"]["config.json"]["size"]
    (tmp_path / "config.json").write_text(json.dumps(config_to_json(HYBRID)) + " \n")
    (found,) = findings(tmp_path, HASHES)
    assert (found.where, found.expected) == ("config.json", f"{size} bytes")


def test_recorded_file_that_is_gone_is_found(tmp_path):
    write_hybrid(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    record_hashes(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (found,) = findings(tmp_path, HASHES)
    assert (found.where, found.message) == ("tokenizer.json", "recorded file is missing")


def test_what_has_no_recorded_hash_is_a_warning(tmp_path):
    write_hybrid(tmp_path)
    record = record_hashes(tmp_path)
    del record["files"][LAST_SHARD]
    del record["tensors"]["lm_head.weight"]
    write_json(tmp_path / "conversion.json", record)
    of_file, of_tensor = findings(tmp_path, HASHES)
    assert {of_file.severity, of_tensor.severity} == {Severity.WARNING}
    assert of_file.where == LAST_SHARD
    assert "lm_head.weight" in of_tensor.found


def test_recorded_tensors_that_are_missing_are_one_finding(tmp_path):
    write_hybrid(tmp_path)
    record = record_hashes(tmp_path)
    record["tensors"] |= {f"extra.{n}": {"sha256": "0" * 64} for n in range(40)}
    write_json(tmp_path / "conversion.json", record)
    (found,) = findings(tmp_path, HASHES)
    assert found.message == "40 tensors with a recorded hash are missing"
    assert found.severity is Severity.ERROR


@pytest.mark.parametrize("content", ["{", '{"files": 3}', "[]"])
def test_record_that_is_not_understood_is_a_finding(content, tmp_path):
    write_hybrid(tmp_path)
    (tmp_path / "conversion.json").write_text(content)
    (found,) = findings(tmp_path, HASHES)
    assert found.where == str(tmp_path / "conversion.json")
    assert found.severity is Severity.ERROR


def renamed(old, new):
    def edit(tensors):
        if old in tensors:
            tensors[new] = tensors.pop(old)

    return edit


def reshaped(tensors):
    tensors["model.norm.weight"] = torch.ones(31)


def integers(tensors):
    tensors["model.norm.weight"] = torch.ones(32, dtype=torch.int32)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        pytest.param(
            renamed("model.norm.weight", "model.nrm.weight"),
            ["model.norm.weight", "model.nrm.weight"],
            id="missing-and-unknown",
        ),
        pytest.param(reshaped, ["model.norm.weight", "[32]", "[31]"], id="shape"),
        pytest.param(integers, ["model.norm.weight", "I32"], id="dtype"),
    ],
)
def test_tensors_that_are_not_as_configured_are_a_finding(edit, said, tmp_path):
    write_hybrid(tmp_path, num_shards=1)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    (found,) = findings(tmp_path)
    text = f"{found.message} {found.expected} {found.found}"
    assert found.check == "tensors"
    assert not [part for part in said if part not in text]


def test_all_kinds_of_damage_are_told_at_once(tmp_path):
    write_hybrid(tmp_path, num_shards=1)
    record_hashes(tmp_path)

    def damage(tensors):
        tensors["model.nrm.weight"] = tensors.pop("model.norm.weight")
        tensors["lm_head.weight"][0, 0] = math.nan

    edit_tensors(tmp_path, damage)
    checks = {found.check for found in findings(tmp_path)}
    assert checks == {"tensors", Check.VALUES, Check.HASHES}


def test_file_that_no_index_names_is_a_warning(tmp_path):
    write_hybrid(tmp_path)
    save_file({"stray": torch.zeros(2)}, tmp_path / "stray.safetensors")
    (found,) = findings(tmp_path)
    assert (found.where, found.severity) == ("stray.safetensors", Severity.WARNING)


def test_tensors_that_nothing_reads_are_listed_with_the_reason(tmp_path):
    write_tiny_checkpoint(tmp_path, TEACHER, num_shards=1)
    path = tmp_path / "model.safetensors"
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file(load_file(path) | {name: torch.ones(4)}, path, metadata={"format": "pt"})
    report, found = check(tmp_path, config=TEACHER)
    assert found == ()
    assert list(report.left_out) == [name]


@pytest.mark.parametrize(
    "break_it",
    [
        pytest.param(lambda path: path.unlink(), id="missing-shard"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-9]), id="cut-off"),
        pytest.param(
            lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), id="lfs"
        ),
    ],
)
def test_unreadable_checkpoint_is_an_error(break_it, tmp_path):
    write_hybrid(tmp_path)
    break_it(tmp_path / FIRST_SHARD)
    with pytest.raises(CheckpointError):
        check(tmp_path)


def test_progress_ends_with_all_bytes(tmp_path):
    write_hybrid(tmp_path)
    events = []
    check_integrity(tmp_path, HYBRID, checks=ALL, on_progress=events.append)
    last = events[-1]
    assert last.done == last.total == open_index(tmp_path).nbytes
