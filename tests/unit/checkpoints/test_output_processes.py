"""Output folders and real processes: killed at every step, two at once, and a real full disk."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from kimi_convert.checkpoints.index import open_index
from kimi_convert.checkpoints.output import open_output
from kimi_convert.checkpoints.shard_plan import PlannedTensor, plan_shards
from kimi_convert.checkpoints.staging import PARTIAL_FOLDER
from kimi_convert.errors import CheckpointError, OutputError
from tests.unit.checkpoints.raw_files import names_in

# Writes four tensors into two files. Sends itself SIGKILL before the call of the number given,
# counted over every call that changes the disk.
WRITER = """
import os, signal, sys
from pathlib import Path

folder, kill_at, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
calls = 0

def counted(function):
    def call(*args, **kwargs):
        global calls
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        calls += 1
        return function(*args, **kwargs)
    return call

for owner, name in ((os, "write"), (os, "fsync"), (os, "ftruncate"), (Path, "mkdir"),
                    (Path, "rename"), (Path, "unlink"), (Path, "rmdir")):
    setattr(owner, name, counted(getattr(owner, name)))

from kimi_convert.checkpoints import PlannedTensor, open_output, plan_shards
from kimi_convert.errors import KimiConvertError

plan = plan_shards([PlannedTensor(f"t{i}", "U8", (size,)) for i in range(4)], 3 * size)
try:
    with open_output(folder) as output:
        print("claimed", flush=True)
        if "wait" in sys.argv:
            sys.stdin.read(1)
        for planned in plan.shards:
            with output.shard(planned) as shard:
                for tensor in planned.tensors:
                    shard.write(tensor.name, [tensor.name.encode() * (size // 2)])
        output.write_index(plan)
        output.write_json("config.json", {})
except KimiConvertError as error:
    print(error)
    sys.exit(error.exit_code)
print(calls)
"""
SIZE = 600
PLAN = plan_shards([PlannedTensor(f"t{i}", "U8", (SIZE,)) for i in range(4)], 3 * SIZE)


def start(folder, *, kill_at=-1, size=SIZE, arguments=(), **options):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(kill_at), str(size), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def run(folder, **options):
    """Return the exit code and the last line."""
    process = start(folder, **options)
    out, err = process.communicate(timeout=60)
    assert not err
    return process.returncode, (out.splitlines() or [""])[-1]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def is_loadable(folder):
    try:
        return len(open_index(folder).tensors) > 0
    except CheckpointError:
        return False


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The files of an undisturbed run, and its number of calls that change the disk."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    code, calls = run(folder)
    assert code == 0
    return contents(folder), int(calls)


def test_process_killed_at_any_step_leaves_a_whole_checkpoint_or_none(tmp_path, whole):
    files, calls = whole
    processes = []
    outcomes = []
    for at in range(calls):
        processes.append((at, start(tmp_path / str(at), kill_at=at)))
        if len(processes) < 2 and at + 1 < calls:
            continue
        for step, process in processes:
            process.communicate(timeout=60)
            assert process.returncode == -signal.SIGKILL
            outcomes.append(_check_after_kill(tmp_path / str(step), files))
        processes = []
    assert outcomes == sorted(outcomes), "a later step never undoes what an earlier one reached"
    assert set(outcomes) == {0, 1, 2}
    assert outcomes.count(0) > calls // 2


def _check_after_kill(folder, files):
    """Return 0: nothing was in place, a new run works. 1: half moved, refused. 2: whole."""
    if is_loadable(folder):
        assert contents(folder) == files
        return 2
    moved = contents(folder) if folder.exists() else {}
    code, said = run(folder)
    if moved:
        assert code == 3, said
        assert "not empty" in said
        assert not is_loadable(folder)
        return 1
    assert code == 0
    assert contents(folder) == files
    assert not (folder / PARTIAL_FOLDER).exists()
    return 0


def test_second_live_process_is_refused_and_the_first_is_not_disturbed(tmp_path, whole):
    first = start(tmp_path / "out", arguments=["wait"])
    assert first.stdout is not None
    assert first.stdout.readline() == "claimed\n"
    with (
        pytest.raises(OutputError, match="another process") as caught,
        open_output(tmp_path / "out"),
    ):
        pytest.fail("claimed twice")
    assert f"process {first.pid} on " in caught.value.found
    first.communicate("x", timeout=60)
    assert first.returncode == 0
    assert contents(tmp_path / "out") == whole[0]


def test_processes_that_race_for_a_folder_leave_one_whole_checkpoint(tmp_path, whole):
    processes = [start(tmp_path / "a" / "out") for _ in range(6)]
    outputs = [process.communicate(timeout=60) for process in processes]
    codes = [process.returncode for process in processes]
    assert codes.count(0) == 1, outputs
    assert codes.count(3) == 5, outputs
    assert contents(tmp_path / "a" / "out") == whole[0]
    assert not (tmp_path / "a" / "out" / PARTIAL_FOLDER).exists()


def test_interrupt_from_the_keyboard_leaves_nothing(tmp_path):
    process = start(tmp_path / "out", arguments=["wait"])
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in err
    assert names_in(tmp_path) == []


def test_limit_of_the_system_in_the_middle_of_a_file_is_exit_5_and_leaves_nothing(tmp_path):
    """A limit on the size of files: the kernel takes part of a write, then refuses the rest."""

    def limit():
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    code, said = run(tmp_path / "out", size=80_000, preexec_fn=limit)
    assert code == 5
    assert "File too large" in said
    assert names_in(tmp_path) == []
