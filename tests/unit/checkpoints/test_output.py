"""Output folders: whole or nothing, on every path that an exception can take."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kimi_convert.checkpoints import disk, regular_file
from kimi_convert.checkpoints.index import open_index
from kimi_convert.checkpoints.output import open_output
from kimi_convert.checkpoints.reader import CheckpointReader
from kimi_convert.checkpoints.regular_file import CHUNK_BYTES
from kimi_convert.checkpoints.shard_plan import PlannedTensor, plan_shards
from kimi_convert.checkpoints.staging import PARTIAL_FOLDER
from kimi_convert.checkpoints.tensor_bytes import write_tensor
from kimi_convert.checkpoints.written import tensor_hashes
from kimi_convert.errors import CheckpointError, OutputError, ResourceError, VerificationError
from tests.unit.checkpoints.raw_files import INDEX, names_in, write_checkpoint

TENSORS = {f"t{number}": bytes([number]) * 300 for number in range(5)}
PLAN = plan_shards([PlannedTensor(name, "U8", (300,)) for name in TENSORS], 800)
SHARDS = [shard.file_name for shard in PLAN.shards]


def fill(output, *, chunks=lambda name: [TENSORS[name][:100], TENSORS[name][100:]]):
    """Write a whole checkpoint of three files and three others."""
    output.write_json("config.json", {"model_type": "x"})
    for planned in PLAN.shards:
        with output.shard(planned) as shard:
            for tensor in planned.tensors:
                shard.write(tensor.name, chunks(tensor.name))
    output.write_index(PLAN)
    output.write_bytes("tokenizer.json", b"{}")


def attempt(folder, body):
    """Run the body of an output."""
    with open_output(folder) as output:
        body(output)


def write_whole(folder):
    attempt(folder, fill)


def everything_under(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def assert_nothing_left(folder):
    """The folder is gone if it was new, and as it was if it was there."""
    assert not folder.exists() or everything_under(folder) == []


@pytest.fixture(params=["new folder", "empty folder", "new folders", "interrupted run"])
def folder(request, tmp_path):
    path = tmp_path / "out"
    if request.param == "new folders":
        path = tmp_path / "a" / "b" / "out"
    if request.param == "empty folder":
        path.mkdir()
    if request.param == "interrupted run":
        (path / PARTIAL_FOLDER / "sub").mkdir(parents=True)
        (path / PARTIAL_FOLDER / "lock").write_bytes(b"process 1 on nowhere")
        (path / PARTIAL_FOLDER / SHARDS[0]).write_bytes(b"half")
        (path / PARTIAL_FOLDER / "sub" / "file").write_bytes(b"old")
        (path / PARTIAL_FOLDER / "link").symlink_to("/etc")
    return path


def test_whole_checkpoint_appears_and_nothing_else(folder):
    write_whole(folder)
    assert everything_under(folder) == sorted([*SHARDS, INDEX, "config.json", "tokenizer.json"])
    with CheckpointReader(open_index(folder)) as reader:
        found = {name: b"".join(reader.chunks(name)) for name in reader.index.tensors}
    assert found == TENSORS


def test_library_loads_what_was_written(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5).to(torch.bfloat16)}
    plan = plan_shards(
        [PlannedTensor("a", "F32", (3, 4)), PlannedTensor("b", "BF16", (5,))], 10**9
    )
    with open_output(tmp_path / "out") as output:
        with output.shard(plan.shards[0]) as shard:
            for name, tensor in tensors.items():
                write_tensor(shard, name, tensor)
        output.write_index(plan)
    found = load_file(tmp_path / "out" / plan.shards[0].file_name)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_index_is_written_for_one_file_too_and_states_the_size(tmp_path):
    plan = plan_shards([PlannedTensor("t", "U8", (4,))], 10**9)
    with open_output(tmp_path / "out") as output:
        with output.shard(plan.shards[0]) as shard:
            shard.write("t", b"1234")
        output.write_index(plan)
    assert json.loads((tmp_path / "out" / INDEX).read_bytes()) == {
        "metadata": {"total_size": 4},
        "weight_map": {"t": "model-00001-of-00001.safetensors"},
    }


def test_same_calls_give_the_same_bytes(tmp_path):
    contents = []
    for name in ("one", "two"):
        write_whole(tmp_path / name)
        contents.append({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()})
    assert contents[0] == contents[1]


def test_files_report_sizes_and_hashes(tmp_path):
    with open_output(tmp_path / "out") as output:
        fill(output)
        written = output.files
    assert [file.name for file in written][:3] == SHARDS
    assert len(written) == 6
    contents = {file.name: (tmp_path / "out" / file.name).read_bytes() for file in written}
    assert {file.name: file.nbytes for file in written} == {
        name: len(content) for name, content in contents.items()
    }
    headers = {planned.file_name: planned.header() for planned in PLAN.shards}
    assert [file.header_sha256 for file in written[:3]] == [
        hashlib.sha256(headers[name]).hexdigest() for name in SHARDS
    ]
    assert [file.sha256 for file in written[3:]] == [
        hashlib.sha256(contents[file.name]).hexdigest() for file in written[3:]
    ]


def test_hash_of_every_tensor_is_reported(tmp_path):
    with open_output(tmp_path / "out") as output:
        fill(output)
        found = tensor_hashes(output.files)
    assert found == {name: hashlib.sha256(c).hexdigest() for name, c in TENSORS.items()}


def test_nothing_is_in_place_before_the_end(tmp_path):
    with open_output(tmp_path / "out") as output:
        fill(output)
        assert names_in(tmp_path / "out") == [PARTIAL_FOLDER]
        with pytest.raises(CheckpointError):
            open_index(tmp_path / "out")


def test_files_are_durable_and_renamed_in_order(tmp_path, monkeypatch):
    events = []
    rename, fsync = Path.rename, os.fsync

    def seen_fsync(descriptor):
        events.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        fsync(descriptor)

    def seen_rename(path, target):
        events.append(("rename", target.name))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(Path, "rename", seen_rename)
    write_whole(tmp_path / "out")
    synced = ["config.json", *SHARDS, INDEX, "tokenizer.json"]
    renamed = [*SHARDS, "tokenizer.json", "config.json", INDEX]
    assert events == [
        *(("sync", name) for name in synced),
        *(("rename", name) for name in renamed),
        ("sync", "out"),
        ("sync", tmp_path.name),
    ]


def test_folder_without_weights_needs_no_index(tmp_path):
    with open_output(tmp_path / "out") as output:
        output.write_bytes("report.html", b"x")
    assert everything_under(tmp_path / "out") == ["report.html"]


def test_output_folder_is_told_as_a_real_path(tmp_path):
    (tmp_path / "link").symlink_to("real")
    with open_output(tmp_path / "link") as output:
        fill(output)
        assert output.folder == tmp_path / "real"
    assert open_index(tmp_path / "real").nbytes == 1500


def test_change_of_directory_does_not_move_the_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with open_output("out") as output:
        monkeypatch.chdir("elsewhere")
        fill(output)
    assert open_index(tmp_path / "out").nbytes == 1500


class StopError(Exception):
    """Not an error that the package knows."""


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("at", range(5))
def test_exception_in_the_middle_of_any_tensor_leaves_nothing(folder, error, at):
    def chunks(name):
        yield TENSORS[name][:150]
        if name == f"t{at}":
            raise error
        yield TENSORS[name][150:]

    with pytest.raises(error), open_output(folder) as output:
        fill(output, chunks=chunks)
    assert_nothing_left(folder)
    write_whole(folder)
    assert open_index(folder).nbytes == 1500


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
def test_exception_after_the_last_file_leaves_nothing(folder, error):
    def body(output):
        fill(output)
        raise error

    with pytest.raises(error):
        attempt(folder, body)
    assert_nothing_left(folder)


def test_folders_made_for_a_failed_output_are_removed_and_others_are_not(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(StopError), open_output(tmp_path / "a" / "b" / "c"):
        raise StopError
    assert everything_under(tmp_path) == ["a"]


@pytest.mark.parametrize("chunks", [[b"x" * 299], [b"x" * 301], []], ids=["short", "long", "none"])
def test_wrong_number_of_bytes_leaves_nothing(folder, chunks):
    with pytest.raises(VerificationError), open_output(folder) as output:
        fill(output, chunks=lambda name: chunks if name == "t3" else [TENSORS[name]])
    assert_nothing_left(folder)


@pytest.mark.parametrize("missing", range(3))
def test_missing_file_of_the_plan_is_refused(folder, missing):
    """An index that names only what was written would hide the loss."""

    def body(output):
        for planned in PLAN.shards[:missing] + PLAN.shards[missing + 1 :]:
            with output.shard(planned) as shard:
                for tensor in planned.tensors:
                    shard.write(tensor.name, TENSORS[tensor.name])
        output.write_index(PLAN)

    with pytest.raises(VerificationError, match="differ from the plan"):
        attempt(folder, body)
    assert_nothing_left(folder)


def test_weights_without_an_index_are_refused(folder):
    def body(output):
        with output.shard(PLAN.shards[-1]) as shard:
            shard.write("t4", TENSORS["t4"])

    with pytest.raises(VerificationError, match="without an index"):
        attempt(folder, body)
    assert_nothing_left(folder)


def test_tensor_left_out_is_refused(folder):
    def body(output):
        with output.shard(PLAN.shards[0]) as shard:
            shard.write("t0", TENSORS["t0"])

    with pytest.raises(VerificationError, match="not finished"):
        attempt(folder, body)
    assert_nothing_left(folder)


class Fault:
    """Replaces a function: fails at one call, works at all others, counts them."""

    def __init__(self, function, *, at=-1, error: BaseException | None = None):
        self.function, self.at, self.error, self.calls = function, at, error, 0

    def __get__(self, instance, owner=None):
        return self if instance is None else lambda *args: self(instance, *args)

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.error is not None and self.calls - 1 == self.at:
            raise self.error
        return self.function(*args, **kwargs)


NO_SPACE = OSError(28, "No space left on device")
FAULTS = {"write": (os, "write"), "fsync": (os, "fsync"), "rename": (Path, "rename")}


def calls_of_a_whole_run(tmp_path, owner, name):
    with pytest.MonkeyPatch.context() as patch:
        counter = Fault(getattr(owner, name))
        patch.setattr(owner, name, counter)
        write_whole(tmp_path / "counted")
    return counter.calls


@pytest.mark.parametrize(("owner", "name"), FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("error", [NO_SPACE, KeyboardInterrupt()], ids=["disk full", "interrupt"])
def test_failure_of_any_single_call_leaves_nothing_and_the_next_run_works(
    tmp_path, owner, name, error
):
    expected = ResourceError if isinstance(error, OSError) else KeyboardInterrupt
    calls = calls_of_a_whole_run(tmp_path, owner, name)
    assert calls >= 6
    folder = tmp_path / "out"
    for at in range(calls):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, Fault(getattr(owner, name), at=at, error=error))
            with pytest.raises(expected):
                write_whole(folder)
        assert not folder.exists(), f"call {at}"
    write_whole(folder)
    assert open_index(folder).nbytes == 1500


def test_disk_full_in_the_middle_says_how_much_was_wanted_and_is_free(folder, monkeypatch):
    written = 0
    whole = os.write

    def limited(descriptor, data):
        nonlocal written
        written += len(data)
        if written > 1200:
            raise NO_SPACE
        return whole(descriptor, data)

    monkeypatch.setattr(disk.os, "write", limited)
    with pytest.raises(ResourceError, match="No space left") as caught, open_output(folder) as out:
        fill(out)
    assert caught.value.exit_code == 5
    assert "room for" in caught.value.expected
    assert "free" in caught.value.found
    assert_nothing_left(folder)


def test_space_is_checked_before_the_first_byte(folder):
    def body(output):
        output.require_space(1)
        output.require_space(10**18)

    with pytest.raises(ResourceError, match="not enough disk space") as caught:
        attempt(folder, body)
    assert "1000000000000000000 bytes" in caught.value.expected
    assert "free" in caught.value.found
    assert_nothing_left(folder)


def test_space_that_cannot_be_told_is_not_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "free_bytes", lambda _: None)
    with open_output(tmp_path / "out") as output:
        output.require_space(10**18)


def test_file_that_appears_during_the_run_is_not_overwritten(tmp_path):
    folder = tmp_path / "out"

    def body(output):
        fill(output)
        (folder / "config.json").write_bytes(b"precious")

    with pytest.raises(OutputError, match="appeared"):
        attempt(folder, body)
    assert everything_under(folder) == ["config.json"]
    assert (folder / "config.json").read_bytes() == b"precious"


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "/x", "a\0b", "a\nb", ".hidden", PARTIAL_FOLDER, "lock", "a/"],
)
def test_name_that_is_not_a_plain_file_is_refused(folder, name):
    with pytest.raises(OutputError, match="plain file name"), open_output(folder) as output:
        output.write_bytes(name, b"x")
    assert_nothing_left(folder)


@pytest.mark.parametrize("again", ["config.json", SHARDS[0]])
def test_file_written_twice_is_refused(folder, again):
    def body(output):
        fill(output)
        output.write_bytes(again, b"x")

    with pytest.raises(OutputError, match="written twice"):
        attempt(folder, body)
    assert_nothing_left(folder)


def test_json_keeps_the_order_of_keys_and_all_characters(tmp_path):
    with open_output(tmp_path / "out") as output:
        output.write_json("config.json", {"z": 1, "a": ["é", None, 0.1]})
    text = (tmp_path / "out" / "config.json").read_text(encoding="utf-8")
    assert text == '{\n  "z": 1,\n  "a": [\n    "é",\n    null,\n    0.1\n  ]\n}\n'


def test_json_with_nan_is_refused(folder):
    with pytest.raises(ValueError, match="JSON"), open_output(folder) as output:
        output.write_json("config.json", {"a": float("nan")})
    assert_nothing_left(folder)


@pytest.mark.parametrize("nbytes", [0, 5, 2 * CHUNK_BYTES + 3])
def test_file_is_copied(tmp_path, nbytes):
    content = os.urandom(nbytes)
    (tmp_path / "tokenizer.json").write_bytes(content)
    with open_output(tmp_path / "out") as output:
        first = output.copy_file(tmp_path / "tokenizer.json")
        second = output.copy_file(tmp_path / "tokenizer.json", "other.json")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == content
    assert (tmp_path / "out" / "other.json").read_bytes() == content
    assert first.sha256 == second.sha256 == hashlib.sha256(content).hexdigest()


def test_copy_of_a_missing_file_leaves_nothing(tmp_path, folder):
    with pytest.raises(CheckpointError, match="missing"), open_output(folder) as output:
        output.copy_file(tmp_path / "none")
    assert_nothing_left(folder)


def test_file_that_becomes_shorter_while_it_is_copied_leaves_nothing(
    tmp_path, folder, monkeypatch
):
    (tmp_path / "f").write_bytes(b"0123456789")
    whole = regular_file.read_into

    def cut_first(descriptor, view, **where):
        os.truncate(tmp_path / "f", 3)
        whole(descriptor, view, **where)

    monkeypatch.setattr(regular_file, "read_into", cut_first)
    with pytest.raises(CheckpointError, match="ends early"), open_output(folder) as output:
        output.copy_file(tmp_path / "f")
    assert_nothing_left(folder)


def test_source_is_read_while_the_output_is_written(tmp_path):
    source = write_checkpoint(tmp_path / "in", {"one.safetensors": TENSORS})
    with (
        CheckpointReader(open_index(source)) as reader,
        open_output(tmp_path / "out", source=source) as output,
    ):
        fill(output, chunks=lambda name: reader.chunks(name, chunk_bytes=7))
    with CheckpointReader(open_index(tmp_path / "out")) as reader:
        assert {name: b"".join(reader.chunks(name)) for name in TENSORS} == TENSORS
