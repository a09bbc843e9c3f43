"""Conversions carried out: the bytes they write, the same every time, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kimi_convert.checkpoints import disk
from kimi_convert.config.recipe import Recipe
from kimi_convert.conversion import plan_conversion, shard_job
from kimi_convert.conversion.engine import convert_checkpoint
from kimi_convert.conversion.rules import Op
from kimi_convert.errors import CheckpointError, OutputError, ResourceError
from tests.integration.broken import change_tensors
from tests.tiny import tiny_config, write_tiny_checkpoint

TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@pytest.fixture
def source(tmp_path):
    return write_tiny_checkpoint(tmp_path / "source", tiny_config("deepseek_v3", dtype="bfloat16"))


def raw_tensors(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Read every tensor as it lies in the files: dtype, shape and bytes."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if name != "__metadata__":
                begin, end = (start + at for at in entry["data_offsets"])
                found[name] = (entry["dtype"], entry["shape"], data[begin:end])
    return found


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


_EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.")
_LETTER = {"gate": "w1", "up": "w3", "down": "w2"}


def released_name(name: str) -> str:
    """Spell a source tensor as Kimi-Linear does: experts apart, names stay."""
    name = _EXPERT.sub(
        lambda found: f".block_sparse_moe.experts.{found[1]}.{_LETTER[found[2]]}.", name
    )
    name = name.replace(".mlp.shared_experts.", ".block_sparse_moe.shared_experts.")
    return re.sub(r"\.mlp\.gate\.", ".block_sparse_moe.gate.", name)


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3"])
def test_everything_outside_the_mixers_is_copied_bit_for_bit(kind, dtype, tmp_path):
    source = write_tiny_checkpoint(tmp_path / "in", tiny_config(kind, dtype=dtype))
    convert_checkpoint(source, tmp_path / "out", max_shard_bytes=100_000)
    theirs, ours = raw_tensors(source), raw_tensors(tmp_path / "out")
    outside = [name for name in theirs if ".self_attn." not in name]
    assert len(outside) == 3 + 4 * 2 + 3 + 3 * (8 * 3 + 3 + 1 + (kind == "deepseek_v3"))
    assert all(ours[released_name(name)] == theirs[name] for name in outside)
    kept = "model.layers.3.self_attn."
    for leaf in ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"):
        assert ours[kept + leaf + ".weight"] == theirs[kept + leaf + ".weight"]


def test_tied_embedding_is_written_twice(tmp_path):
    config = tiny_config("deepseek_v3", tie_word_embeddings=True)
    convert_checkpoint(write_tiny_checkpoint(tmp_path / "in", config), tmp_path / "out")
    ours = raw_tensors(tmp_path / "out")
    assert ours["lm_head.weight"] == ours["model.embed_tokens.weight"]
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]


def test_missing_correction_bias_becomes_zero(tmp_path):
    source = write_tiny_checkpoint(tmp_path / "in", tiny_config("deepseek_v2"))
    convert_checkpoint(source, tmp_path / "out")
    made = tensors_of(tmp_path / "out")
    bias = made["model.layers.1.block_sparse_moe.gate.e_score_correction_bias"]
    assert torch.equal(bias, torch.zeros(8))


@pytest.mark.parametrize("dtype", TORCH)
def test_made_tensors_are_rounded_once(dtype, tmp_path):
    source = write_tiny_checkpoint(tmp_path / "in", tiny_config("deepseek_v3", dtype=dtype))
    convert_checkpoint(source, tmp_path / "out")
    theirs, ours = tensors_of(source), tensors_of(tmp_path / "out")
    prefix = "model.layers.1.self_attn."
    down, norm, up = (
        theirs[f"{prefix}{leaf}.weight"].double()
        for leaf in ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj")
    )
    key = up.view(4, 32, 12)[:, :16].reshape(64, 12) @ torch.diag(norm) @ down[:12]
    stored = ours[prefix + "k_proj.weight"]
    assert stored.dtype == TORCH[dtype]
    if dtype == "float32":
        assert (stored - key).abs().max() <= 1e-6 * key.abs().max()
    else:
        # fp32 is 2^13 finer at least: in one of thousands of values does it land on the other
        # side of a rounding border. A second rounding in between would change one in four.
        assert (stored != key.to(TORCH[dtype])).float().mean() <= 1e-3


def test_decay_is_stored_in_fp32_whatever_the_model_is(source, tmp_path):
    convert_checkpoint(source, tmp_path / "out", recipe=Recipe(half_life_tokens=(0.5, 50.0)))
    ours = tensors_of(tmp_path / "out")
    a_log = ours["model.layers.0.self_attn.A_log"]
    bias = ours["model.layers.0.self_attn.dt_bias"]
    assert (a_log.dtype, a_log.shape, bias.dtype) == (torch.float32, (1, 1, 4, 1), torch.float32)
    # The middle of the half-lives is 5 tokens, and softplus gives 1 there.
    assert np.unique(a_log.numpy()).tolist() == [np.float32(math.log(math.log(2) / 5))]
    steps = math.sqrt(100) * 100 ** (-np.arange(16) / 15)
    expected = np.tile(np.log(np.expm1(steps)), 4).astype(np.float32)
    assert np.array_equal(bias.numpy(), expected)


def test_teacher_with_pruned_layers_gives_finite_weights(source, tmp_path):
    def prune(tensors):
        for leaf in ("q_proj", "kv_b_proj", "kv_a_proj_with_mqa", "o_proj", "kv_a_layernorm"):
            tensors[f"model.layers.1.self_attn.{leaf}.weight"].zero_()
        tensors["model.layers.2.input_layernorm.weight"].zero_()
        tensors["model.layers.0.self_attn.kv_b_proj.weight"][:40].zero_()

    change_tensors(source, prune)
    convert_checkpoint(source, tmp_path / "out")
    assert all(bool(t.isfinite().all()) for t in tensors_of(tmp_path / "out").values())


def test_converting_twice_gives_the_same_bytes(source, tmp_path):
    for name in ("one", "two"):
        convert_checkpoint(source, tmp_path / name)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


@pytest.fixture
def sensitive(tmp_path):
    """Shapes whose fp32 products differ in their last bits between one thread and four."""
    fields = {"hidden_size": 100, "kv_lora_rank": 33, "qk_nope_head_dim": 20, "v_head_dim": 20}
    config = tiny_config("deepseek_v3", num_hidden_layers=2, first_k_dense_replace=2, **fields)
    return write_tiny_checkpoint(tmp_path / "sensitive", config)


def test_number_of_threads_does_not_change_a_byte(sensitive, tmp_path):
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            convert_checkpoint(sensitive, tmp_path / str(threads))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert digests(tmp_path / "1") == digests(tmp_path / "2") == digests(tmp_path / "4")


def test_number_of_threads_in_the_environment_does_not_change_a_byte(sensitive, tmp_path):
    code = "import sys; from kimi_convert.conversion.engine import convert_checkpoint as c; c(*sys.argv[1:])"
    for threads in ("1", "4"):
        subprocess.run(
            [sys.executable, "-c", code, str(sensitive), str(tmp_path / threads)],
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
            check=True,
        )
    assert digests(tmp_path / "1") == digests(tmp_path / "4")


def test_number_of_files_does_not_change_a_tensor(source, tmp_path):
    convert_checkpoint(source, tmp_path / "one")
    convert_checkpoint(source, tmp_path / "many", max_shard_bytes=50_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 5
    assert raw_tensors(tmp_path / "one") == raw_tensors(tmp_path / "many")


def test_teachers_files_do_not_change_a_tensor(tmp_path):
    config = tiny_config("deepseek_v3")
    for shards in (1, 5):
        source = write_tiny_checkpoint(tmp_path / f"in{shards}", config, num_shards=shards)
        convert_checkpoint(source, tmp_path / f"out{shards}")
    assert raw_tensors(tmp_path / "out1") == raw_tensors(tmp_path / "out5")


def test_seed_changes_nothing_but_the_random_weights(source, tmp_path):
    for seed in (0, 1):
        convert_checkpoint(source, tmp_path / str(seed), recipe=Recipe(seed=seed))
    one, two = raw_tensors(tmp_path / "0"), raw_tensors(tmp_path / "1")
    changed = {name.rpartition("self_attn.")[2] for name in one if one[name] != two[name]}
    assert changed == {"f_a_proj.weight", "g_a_proj.weight"}


def assert_nothing_left(tmp_path):
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


SPOILED = (
    "model.norm.weight",
    "model.layers.2.mlp.experts.3.up_proj.weight",
    "model.layers.2.mlp.gate.e_score_correction_bias",
    "model.layers.1.self_attn.kv_b_proj.weight",
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.0.self_attn.o_proj.weight",
    "model.layers.1.input_layernorm.weight",
    "model.layers.3.self_attn.q_proj.weight",
)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("name", SPOILED)
def test_value_that_is_not_finite_is_refused_by_name(name, value, source, tmp_path):
    # The last element: in q it belongs to a rotated row, which would be left out.
    change_tensors(source, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    before = digests(source)
    with pytest.raises(CheckpointError, match="not finite") as caught:
        convert_checkpoint(source, tmp_path / "out")
    assert repr(name) in caught.value.message
    assert caught.value.where == str(source)
    assert_nothing_left(tmp_path)
    assert digests(source) == before


def test_dropped_tensor_may_hold_anything(source, tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(source, lambda tensors: tensors.update({name: torch.full((4,), math.nan)}))
    convert_checkpoint(source, tmp_path / "out")
    assert name not in raw_tensors(tmp_path / "out")


def test_value_too_large_for_fp16_is_refused_by_name(tmp_path):
    config = tiny_config("deepseek_v3", dtype="float16")
    source = write_tiny_checkpoint(tmp_path / "source", config)
    name = "model.layers.0.self_attn.q_proj.weight"
    change_tensors(source, lambda tensors: tensors[name].fill_(1e-7))
    with pytest.raises(CheckpointError, match="cannot be stored as F16") as caught:
        convert_checkpoint(source, tmp_path / "out")
    assert "model.layers.0.self_attn.q_conv1d.weight" in caught.value.message
    assert "e+0" in caught.value.found
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("existed", [False, True], ids=["new-folder", "empty-folder"])
def test_fault_in_a_transform_leaves_nothing(existed, source, tmp_path, monkeypatch):
    def fail(job):
        raise ZeroDivisionError(job.target)

    monkeypatch.setattr(shard_job, "TRANSFORMS", {**shard_job.TRANSFORMS, Op.SCALE_OUTPUT: fail})
    target = tmp_path / "out"
    if existed:
        target.mkdir()
    with pytest.raises(ZeroDivisionError, match=r"layers\.0\.kda\.o\.weight"):
        convert_checkpoint(source, target)
    assert target.exists() == existed
    if existed:
        target.rmdir()
    assert_nothing_left(tmp_path)


def test_fault_in_a_transform_gives_the_threads_back(source, tmp_path, monkeypatch):
    def fail(job):
        assert torch.get_num_threads() == 1
        raise ZeroDivisionError(job.target)

    monkeypatch.setattr(shard_job, "TRANSFORMS", {**shard_job.TRANSFORMS, Op.FOLD_KEY: fail})
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(ZeroDivisionError):
            convert_checkpoint(source, tmp_path / "out")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("at", [0, 40, -2], ids=["first", "middle", "last"])
def test_interrupt_from_the_progress_callback_leaves_nothing(at, source, tmp_path):
    events = []
    convert_checkpoint(source, tmp_path / "whole", on_progress=events.append)
    shutil.rmtree(tmp_path / "whole")
    stop = events[at]

    def interrupt(event):
        if event == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, tmp_path / "out", on_progress=interrupt)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("source", "is the source folder"),
        ("source/out", "lies inside the source folder"),
        ("", "holds the source folder"),
        ("source/../source", "is the source folder"),
    ],
    ids=["same", "inside", "around", "same-by-another-path"],
)
def test_output_that_is_not_apart_from_the_source_is_refused(place, message, source, tmp_path):
    before = digests(source)
    with pytest.raises(OutputError, match=message):
        convert_checkpoint(source, tmp_path / place)
    assert digests(source) == before
    assert_nothing_left(tmp_path)


def test_link_to_the_source_is_refused(source, tmp_path):
    (tmp_path / "link").symlink_to(source)
    before = digests(source)
    with pytest.raises(OutputError, match="is the source folder"):
        convert_checkpoint(source, tmp_path / "link")
    assert digests(source) == before


def test_folder_that_is_not_empty_is_refused_and_left_alone(source, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        convert_checkpoint(source, target)
    assert [path.name for path in target.iterdir()] == ["notes.txt"]


def test_full_disk_is_found_before_the_first_byte(source, tmp_path, monkeypatch):
    events = []
    (source / "tokenizer.json").write_bytes(b"x" * 1000)
    needed = plan_conversion(source).write_bytes + 1000
    monkeypatch.setattr(disk, "free_bytes", lambda _: needed - 1)
    with pytest.raises(ResourceError, match="disk space"):
        convert_checkpoint(source, tmp_path / "out", on_progress=events.append)
    assert events == []
    assert_nothing_left(tmp_path)
    monkeypatch.setattr(disk, "free_bytes", lambda _: needed)
    convert_checkpoint(source, tmp_path / "out")


def test_progress_counts_bytes_up_to_the_total(source, tmp_path):
    events = []
    result = convert_checkpoint(source, tmp_path / "out", on_progress=events.append)
    plan = result.plan
    sizes = [task.tensor.nbytes for task in plan.tasks]
    assert [event.done for event in events] == [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    assert {(event.stage, event.unit, event.total) for event in events} == {
        ("converting", "bytes", sum(sizes))
    }
    assert [event.detail for event in events] == [*(t.tensor.name for t in plan.tasks), ""]


def test_result_names_every_file_with_its_hash(source, tmp_path):
    result = convert_checkpoint(source, tmp_path / "out", max_shard_bytes=100_000)
    document = json.loads(json.dumps(result.to_json()))
    assert document["output"] == str(tmp_path / "out")
    assert document["seconds"] >= 0
    assert "tensors" not in document
    found = {file["name"]: file["sha256"] for file in document["files"] if "sha256" in file}
    there = digests(result.output)
    assert found == {n: there[n] for n in there if not n.endswith(".safetensors")}
    assert sum("header_sha256" in file for file in document["files"]) == len(there) - len(found)
    assert {file["name"]: file["size"] for file in document["files"]} == {
        path.name: path.stat().st_size for path in result.output.iterdir()
    }


def test_data_files_are_carried_over_and_code_is_not(source, tmp_path):
    carried = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE")
    left = ("modeling_deepseek.py", "tokenization_moonshot.py", "README.md", "pytorch_model.bin")
    for name in (*carried, *left):
        (source / name).write_text(f"content of {name}")
    convert_checkpoint(source, tmp_path / "out")
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert all((tmp_path / "out" / n).read_text() == f"content of {n}" for n in carried)
    assert there == {
        *carried,
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "conversion.json",
    }
