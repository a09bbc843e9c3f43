"""Conversions on disks that share blocks: the same bytes, in less room, whatever goes wrong."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from kimi_convert.checkpoints import clone
from kimi_convert.checkpoints.disk import free_bytes
from kimi_convert.checkpoints.index import open_index
from kimi_convert.checkpoints.output import open_output
from kimi_convert.checkpoints.reader import CheckpointReader
from kimi_convert.checkpoints.shared_layout import shared_bytes
from kimi_convert.checkpoints.staging import PARTIAL_FOLDER
from kimi_convert.cli import main
from kimi_convert.commands._numbers import bytes_text
from kimi_convert.config.huggingface import read_config
from kimi_convert.conversion.engine import convert_checkpoint
from kimi_convert.conversion.plan import plan_conversion
from kimi_convert.conversion.rewriting import plan_rewriting, write_weights
from kimi_convert.conversion.runners import Processes, one_by_one
from kimi_convert.conversion.tasks import copies
from kimi_convert.errors import CheckpointError, ResourceError
from kimi_convert.exporters.safetensors import export_safetensors
from tests.cloning_disk import KINDS, cloning_disk
from tests.tiny import tiny_config, write_tiny_checkpoint

SHARD_BYTES = 36 * 2**20  # two files, each with a layer of experts


@pytest.fixture(scope="module", params=KINDS)
def disk(request, tmp_path_factory):
    with cloning_disk(request.param, tmp_path_factory.mktemp(request.param)) as folder:
        yield folder


def write_source(folder):
    config = tiny_config(
        "deepseek_v3",
        dtype="bfloat16",
        hidden_size=1024,
        moe_intermediate_size=1024,
        n_routed_experts=4,
        num_hidden_layers=3,
    )
    return write_tiny_checkpoint(folder, config)


@pytest.fixture(scope="module")
def source(disk):
    return write_source(disk / "source")


@pytest.fixture(scope="module")
def written(source, tmp_path_factory):
    """What the conversion gives on a disk that shares nothing with that of the source."""
    output = tmp_path_factory.mktemp("apart") / "out"
    convert(source, output)
    return digests(output)


@pytest.fixture
def place(disk, request):
    """A new folder on the disk."""
    return disk / f"output-{request.node.callspec.id}-{request.node.originalname}"


def convert(source, output, **options):
    return convert_checkpoint(source, output, max_shard_bytes=SHARD_BYTES, **options)


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def used_bytes(folder):
    os.sync()
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def size(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize("runner", [one_by_one, Processes(2)], ids=["serial", "processes"])
def test_output_takes_little_room_and_has_the_same_bytes(source, written, place, runner):
    plan = plan_conversion(source, max_shard_bytes=SHARD_BYTES)
    carried = copies(plan.tasks, plan.weights)
    shared = sum(shared_bytes(shard, carried) for shard in plan.shards.shards)
    assert shared > 0.6 * plan.write_bytes
    before = used_bytes(place.parent)
    convert(source, place, runner=runner)
    assert used_bytes(place.parent) - before < size(place) - 0.8 * shared
    assert digests(place) == written


def test_source_may_be_removed_or_written_over(disk, written, place):
    source = write_source(disk / "other")
    convert(source, place)
    for path in source.glob("*.safetensors"):
        path.write_bytes(b"x" * path.stat().st_size)
        path.unlink()
    assert {n: d for n, d in digests(place).items() if n.endswith(".safetensors")} == {
        n: d for n, d in written.items() if n.endswith(".safetensors")
    }


def test_export_and_new_mixers_share_all_that_stays(source, disk, place):
    place.mkdir()
    convert(source, place / "hybrid")
    before = used_bytes(disk)
    export_safetensors(place / "hybrid", place / "again", max_shard_bytes=SHARD_BYTES)
    assert used_bytes(disk) - before < 0.15 * size(place / "hybrid")
    weights = [path.name for path in (place / "hybrid").glob("*.safetensors")]
    for name in weights:
        assert (place / "again" / name).read_bytes() == (place / "hybrid" / name).read_bytes()

    hybrid = place / "hybrid"
    job = plan_rewriting(hybrid, read_config(hybrid), SHARD_BYTES, everything=False)
    with CheckpointReader(open_index(hybrid)) as reader:

        def mixer(layer_idx, name):
            weight = job.matched.weights[f"layers.{layer_idx}.{name}"]
            return reader.tensor(weight.stored[0].name).float()

        before = used_bytes(disk)
        with open_output(place / "aligned", source=hybrid) as target:
            write_weights(target, job, mixer, lambda _: None)
    assert used_bytes(disk) - before < 0.15 * size(hybrid)
    for name in weights:
        assert (place / "aligned" / name).read_bytes() == (hybrid / name).read_bytes()


def test_disk_needs_room_for_what_is_not_shared_alone(disk, source, tmp_path, place):
    elsewhere = write_source(tmp_path / "source")
    filler = disk / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free_bytes(disk) - int(0.8 * size(source)))
    try:
        with pytest.raises(ResourceError, match="not enough disk space"):
            convert(elsewhere, place)
        with pytest.raises(ResourceError, match="not enough disk space"):
            convert(source, place, runner=Fetched())
        convert(source, place)
    finally:
        filler.unlink()


class Fetched(Processes):
    """A runner that reads its source elsewhere."""

    in_place = False

    def __init__(self):
        super().__init__(1)


def test_plan_says_how_much_takes_no_room(tmp_path, capsys):
    source = write_source(tmp_path / "source")
    arguments = ["plan", str(source), "--max-shard-size", str(SHARD_BYTES)]
    assert main([*arguments, "--json"]) == 0
    shared = json.loads(capsys.readouterr().out)["shareable_bytes"]
    assert 40 * 2**20 < shared < 50 * 2**20
    assert main(arguments) == 0
    assert f"{bytes_text(shared)} take no room" in capsys.readouterr().out


def test_bytes_are_the_same_wherever_blocks_are_shared(tmp_path, monkeypatch):
    """As above where no disk can be mounted: a call that copies stands in for the system's."""
    source = write_source(tmp_path / "source")
    with monkeypatch.context() as patch:
        patch.setattr(clone.fcntl, "ioctl", failing_from(1, errno.EOPNOTSUPP))
        convert(source, tmp_path / "written")
    calls = []

    def copy(target, _, argument):
        begin, start, nbytes, at = struct.unpack("=qQQQ", argument)
        calls.append(nbytes)
        os.pwrite(target, os.pread(begin, nbytes, start), at)

    monkeypatch.setattr(clone.fcntl, "ioctl", copy)
    convert(source, tmp_path / "shared")
    assert sum(calls) > 40 * 2**20
    assert digests(tmp_path / "shared") == digests(tmp_path / "written")


def failing_from(call, error):
    calls = 0

    def ioctl(*arguments):
        nonlocal calls
        calls += 1
        if calls >= call:
            raise OSError(error, os.strerror(error))
        return real(*arguments)

    real = fcntl.ioctl
    return ioctl


def test_disk_that_fills_up_leaves_finished_files_alone(source, written, place, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(clone.fcntl, "ioctl", failing_from(16, errno.ENOSPC))
        with pytest.raises(ResourceError, match="cannot write") as caught:
            convert(source, place)
    assert caught.value.exit_code == 5
    finished = [path.name for path in (place / PARTIAL_FOLDER).glob("*.safetensors*")]
    assert finished == [min(name for name in written if name.endswith(".safetensors"))]
    convert(source, place, resume=True)
    assert digests(place) == written


def test_refusal_in_the_middle_changes_no_byte(source, written, place, monkeypatch):
    monkeypatch.setattr(clone.fcntl, "ioctl", failing_from(5, errno.EINVAL))
    convert(source, place)
    assert digests(place) == written


def test_source_that_changes_during_the_run_is_detected(disk, place):
    source = write_source(disk / "changing")
    last = max(source.glob("*.safetensors"))

    def change(event):
        if event.done:
            with last.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"x")

    with pytest.raises(CheckpointError, match="changed while it was in use") as caught:
        convert(source, place, on_progress=change)
    assert caught.value.exit_code == 3
    assert not list(place.rglob("*.part*"))


KILLED = """
import os, signal, sys
from kimi_convert.checkpoints import clone
from kimi_convert.conversion.engine import convert_checkpoint

left = int(sys.argv[3])
real = clone.fcntl.ioctl

def ioctl(*arguments):
    global left
    real(*arguments)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

clone.fcntl.ioctl = ioctl
convert_checkpoint(sys.argv[1], sys.argv[2], max_shard_bytes=int(sys.argv[4]))
"""


@pytest.mark.parametrize("call", [1, 14, 20])
def test_killed_run_is_resumed_to_the_same_bytes(source, written, place, call):
    arguments = [sys.executable, "-c", KILLED, source, place, call, SHARD_BYTES]
    killed = subprocess.run(list(map(str, arguments)), check=False)
    assert killed.returncode == -signal.SIGKILL
    convert(source, place, resume=True)
    assert digests(place) == written
