"""Folders: whole checkpoints are indexed, all others are refused with their cause."""

from __future__ import annotations

import gc
import json
import logging
import os
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from kimi_convert.checkpoints import index as index_module
from kimi_convert.checkpoints.dtypes import torch_dtype
from kimi_convert.checkpoints.index import open_index
from kimi_convert.checkpoints.shard_plan import PlannedTensor, plan_shards
from kimi_convert.errors import CheckpointError
from tests.unit.checkpoints.raw_files import INDEX, shard_of_bytes, write_checkpoint

TWO = {"one.safetensors": {"a": b"aaaa", "b": b"bb"}, "two.safetensors": {"c": b"c"}}


def refused(folder):
    with pytest.raises(CheckpointError) as caught:
        open_index(folder)
    assert caught.value.exit_code == 3
    return caught.value


def test_sharded_folder_is_indexed(tmp_path):
    found = open_index(write_checkpoint(tmp_path, TWO))
    assert list(found.tensors) == ["a", "b", "c"]
    assert list(found.shards) == ["one.safetensors", "two.safetensors"]
    assert found.nbytes == 7
    spec = found.spec("b")
    content = (tmp_path / "one.safetensors").read_bytes()
    assert (spec.shard, content[spec.start : spec.end]) == ("one.safetensors", b"bb")


def test_single_file_folder_is_indexed(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(shard_of_bytes({"a": b"xyz"}))
    assert open_index(str(tmp_path)).spec("a").nbytes == 3


def test_single_file_named_by_an_index_is_indexed(tmp_path):
    write_checkpoint(tmp_path, {"model.safetensors": {"a": b"x"}})
    assert list(open_index(tmp_path).tensors) == ["a"]


@given(
    st.dictionaries(
        st.text("abc.", min_size=1, max_size=6),
        st.tuples(
            st.sampled_from(["F32", "BF16", "F8_E4M3", "I64", "BOOL"]),
            st.lists(st.integers(0, 3), max_size=3),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_index_of_a_file_of_the_library_says_what_the_library_says(tmp_path_factory, shapes):
    folder = tmp_path_factory.mktemp("library", numbered=True)
    path = folder / "model.safetensors"
    save_file(
        {
            name: torch.zeros(shape, dtype=torch_dtype(dtype))
            for name, (dtype, shape) in shapes.items()
        },
        path,
    )
    found = open_index(folder)
    with safe_open(path, "pt") as file:
        theirs = {
            name: (file.get_slice(name).get_dtype(), tuple(file.get_slice(name).get_shape()))
            for name in file.keys()  # noqa: SIM118
        }
    assert {name: (spec.dtype, spec.shape) for name, spec in found.tensors.items()} == theirs


def test_files_in_the_cache_of_the_hub_are_links_and_are_taken(tmp_path):
    blobs = tmp_path / "blobs"
    write_checkpoint(blobs, TWO)
    snapshot = tmp_path / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for name in (*TWO, INDEX):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert open_index(snapshot).nbytes == 7


def test_unknown_tensor_is_refused(tmp_path):
    found = open_index(write_checkpoint(tmp_path, TWO))
    with pytest.raises(CheckpointError, match="no tensor 'd'"):
        found.spec("d")


def test_missing_folder(tmp_path):
    assert "does not exist" in str(refused(tmp_path / "none"))


def test_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    assert "not a folder" in str(refused(tmp_path / "file"))


def test_unusable_path():
    assert "cannot be read" in str(refused("a\0b"))


def test_unreadable_folder(tmp_path, monkeypatch):
    # Root may read everything, so the refusal is simulated.
    def fail(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(index_module.Path, "iterdir", fail)
    assert "Permission denied" in str(refused(tmp_path))


def test_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_bytes(b"{}")
    error = refused(tmp_path)
    assert "holds no weights" in str(error)
    assert INDEX in error.expected


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "x.ckpt", "m.pt"],
)
def test_pickle_only_folder_is_refused_with_a_way_out(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    error = refused(tmp_path)
    assert "pickle" in str(error)
    assert name in error.found
    assert "safetensors" in error.hint


def test_pickle_files_beside_safetensors_are_not_touched(tmp_path):
    write_checkpoint(tmp_path, TWO)
    os.mkfifo(tmp_path / "pytorch_model.bin")
    assert open_index(tmp_path).nbytes == 7


def test_shards_without_an_index_are_refused(tmp_path):
    write_checkpoint(tmp_path, TWO)
    (tmp_path / INDEX).unlink()
    error = refused(tmp_path)
    assert f"no {INDEX}" in str(error)
    assert "one.safetensors" in error.found


def test_stale_single_file_beside_an_index_is_refused(tmp_path):
    write_checkpoint(tmp_path, TWO)
    (tmp_path / "model.safetensors").write_bytes(shard_of_bytes({"a": b"old!"}))
    assert "stale" in refused(tmp_path).hint


def test_missing_shards_are_all_named_up_to_a_cap(tmp_path):
    shards = {f"{number:02d}.safetensors": {f"t{number}": b"x"} for number in range(23)}
    write_checkpoint(tmp_path, shards)
    for name in list(shards)[1:]:
        (tmp_path / name).unlink()
    error = refused(tmp_path)
    assert error.message == "22 files that the index names are missing"
    assert error.found.endswith("'10.safetensors' and 12 more")


def test_link_whose_target_is_gone_counts_as_missing(tmp_path):
    write_checkpoint(tmp_path, TWO)
    (tmp_path / "two.safetensors").unlink()
    (tmp_path / "two.safetensors").symlink_to("../../blobs/gone")
    assert "'two.safetensors'" in refused(tmp_path).found


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_pipe_or_folder_in_place_of_a_shard_is_refused(tmp_path, make):
    write_checkpoint(tmp_path, TWO)
    (tmp_path / "two.safetensors").unlink()
    make(tmp_path / "two.safetensors")
    assert "not a plain file" in str(refused(tmp_path))


def test_no_file_is_opened_when_the_index_names_a_path(tmp_path, monkeypatch):
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(shard_of_bytes({"a": b"secret"}))
    index = {"weight_map": {"a": "../outside.safetensors"}}
    folder = write_checkpoint(tmp_path / "in", {}, index=index)
    monkeypatch.setattr(index_module, "read_header", pytest.fail)
    assert "plain file" in str(refused(folder))


def with_map(**weight_map):
    return {"weight_map": {name: f"{shard}.safetensors" for name, shard in weight_map.items()}}


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (with_map(a="one", b="one", c="two", d="two"), "1 tensors are not in the file"),
        (with_map(a="two", b="one", c="two"), "1 tensors are not in the file"),
        (with_map(a="one", c="two"), "1 tensors are in a file but not in the index"),
    ],
    ids=["not there", "elsewhere", "extra"],
)
def test_index_and_files_must_agree(tmp_path, index, said):
    assert said in str(refused(write_checkpoint(tmp_path, TWO, index=index)))


def test_tensor_in_two_files_is_refused(tmp_path):
    shards = {"one.safetensors": {"a": b"1", "z": b"0"}, "two.safetensors": {"a": b"2", "b": b"3"}}
    error = refused(write_checkpoint(tmp_path, shards))
    assert "in two files" in str(error)
    assert "'a (one.safetensors, two.safetensors)'" in error.found


def test_truncated_shard_is_refused(tmp_path):
    write_checkpoint(tmp_path, TWO)
    path = tmp_path / "one.safetensors"
    os.truncate(path, path.stat().st_size - 3)
    error = refused(tmp_path)
    assert "is cut off" in str(error)
    assert error.where == str(path)


def test_checkpoint_without_tensors_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(shard_of_bytes({}))
    assert "holds no tensors" in str(refused(tmp_path))


def test_oversized_index_is_refused_unread(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, TWO)
    os.truncate(tmp_path / INDEX, 10**9)
    monkeypatch.setattr(index_module, "read_exactly", pytest.fail)
    assert "too large" in str(refused(tmp_path))


@pytest.mark.parametrize(("total_size", "warns"), [(7, False), (8, True)])
def test_wrong_total_size_is_only_a_warning(tmp_path, caplog, total_size, warns):
    index = {"metadata": {"total_size": total_size}, **with_map(a="one", b="one", c="two")}
    write_checkpoint(tmp_path, TWO, index=index)
    with caplog.at_level(logging.WARNING):
        assert open_index(tmp_path).nbytes == 7
    assert bool(caplog.records) is warns


def test_shard_that_the_index_does_not_name_is_a_warning(tmp_path, caplog):
    write_checkpoint(tmp_path, TWO)
    (tmp_path / "three.safetensors").write_bytes(b"not read")
    with caplog.at_level(logging.WARNING):
        open_index(tmp_path)
    assert "'three.safetensors'" in caplog.text


def test_unchanged_file_passes_and_changed_file_does_not(tmp_path):
    file = open_index(write_checkpoint(tmp_path, TWO)).shards["one.safetensors"]
    file.check_unchanged()
    os.utime(file.path, ns=(file.mtime_ns, file.mtime_ns + 1))
    with pytest.raises(CheckpointError, match="changed while it was in use"):
        file.check_unchanged()


def test_file_that_is_gone_has_changed(tmp_path):
    file = open_index(write_checkpoint(tmp_path, TWO)).shards["one.safetensors"]
    file.path.unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        file.check_unchanged()


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collector_is_left_as_it_was(tmp_path, enabled):
    was = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        open_index(write_checkpoint(tmp_path / "good", TWO))
        refused(tmp_path / "none")
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if was else gc.disable)()


def test_headers_are_read_in_microseconds_per_tensor(tmp_path):
    tensors = [
        PlannedTensor(f"model.layers.{i // 800}.mlp.experts.{i}.weight", "F8_E4M3", (2048, 7168))
        for i in range(50_000)
    ]
    plan = plan_shards(tensors, 12_000_000_000)
    for shard in plan.shards:
        with (tmp_path / shard.file_name).open("wb") as file:
            file.write(shard.header())
            file.truncate(shard.file_bytes)
    (tmp_path / INDEX).write_bytes(plan.index_json())
    began = time.process_time()
    found = open_index(tmp_path)
    # 0.35 s when written; one quadratic step in it would take minutes.
    assert time.process_time() - began < 2
    assert len(found.shards) > 60
    assert len(found.tensors) == 50_000
    assert (
        found.nbytes == plan.total_size == json.loads(plan.index_json())["metadata"]["total_size"]
    )
