"""Interrupted conversions: what stays, who may go on from it, and that the bytes are the same."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kimi_convert.checkpoints.index import open_index
from kimi_convert.checkpoints.journal import JOURNAL_FILE
from kimi_convert.checkpoints.staging import PARTIAL_FOLDER
from kimi_convert.config.recipe import Recipe
from kimi_convert.conversion.engine import convert_checkpoint
from kimi_convert.conversion.runners import Processes
from kimi_convert.errors import CheckpointError, OutputError, ResourceError
from tests.tiny import tiny_config, write_tiny_checkpoint

SHARD_BYTES = 50_000


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume") / "source"
    return write_tiny_checkpoint(folder, tiny_config("deepseek_v3", dtype="bfloat16"))


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "out"
    convert(source, output)
    return digests(output)


def convert(source, output, **options):
    return convert_checkpoint(source, output, **{"max_shard_bytes": SHARD_BYTES, **options})


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


class CutError(Exception):
    pass


def cut_after(shards, error=CutError):
    """Return a progress callback that ends the run once so many files are finished."""

    def on_progress(event):
        folder = on_progress.output / PARTIAL_FOLDER
        finished = (folder / JOURNAL_FILE).read_text().count('"tensors"')
        if finished >= shards:
            raise error

    return on_progress


def interrupted(source, output, shards=3, error=CutError):
    callback = cut_after(shards, error)
    callback.output = output
    with pytest.raises(error):
        convert(source, output, on_progress=callback)
    return output / PARTIAL_FOLDER


@pytest.mark.parametrize("error", [CutError, KeyboardInterrupt])
def test_finished_files_stay_and_nothing_else(source, tmp_path, error):
    partial = interrupted(source, tmp_path / "out", 3, error)
    assert {path.name for path in partial.iterdir()} == {
        "lock",
        JOURNAL_FILE,
        *(f"model-{n:05d}-of-00006.safetensors" for n in (1, 2, 3)),
    }
    assert [path.name for path in (tmp_path / "out").iterdir()] == [PARTIAL_FOLDER]
    with pytest.raises(CheckpointError):
        open_index(tmp_path / "out")


def test_resumed_run_writes_only_what_is_missing_and_gives_the_same_bytes(source, tmp_path, whole):
    partial = interrupted(source, tmp_path / "out")
    before = {path.name: path.stat().st_ino for path in partial.glob("*.safetensors")}
    events = []
    convert(source, tmp_path / "out", resume=True, on_progress=events.append)
    assert digests(tmp_path / "out") == whole
    after = {name: (tmp_path / "out" / name).stat().st_ino for name in before}
    assert after == before
    assert events[0].done > 0
    assert events[-1].done == events[-1].total


def test_resume_without_anything_to_resume_is_an_ordinary_run(source, tmp_path, whole):
    convert(source, tmp_path / "out", resume=True)
    assert digests(tmp_path / "out") == whole


def test_run_without_resume_is_refused_and_nothing_is_lost(source, tmp_path, whole):
    interrupted(source, tmp_path / "out")
    for _ in range(2):
        with pytest.raises(OutputError, match="interrupted run") as caught:
            convert(source, tmp_path / "out")
        assert f"3 finished files of process {os.getpid()} on " in caught.value.found
        assert "--resume" in caught.value.hint
    convert(source, tmp_path / "out", resume=True)
    assert digests(tmp_path / "out") == whole


def changed_recipe(source, output):
    convert(source, output, resume=True, recipe=Recipe(seed=1))


def changed_shard_size(source, output):
    convert(source, output, resume=True, max_shard_bytes=2 * SHARD_BYTES)


def changed_version(source, output):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kimi_convert.conversion.engine.__version__", "0.0.0")
        convert(source, output, resume=True)


def changed_source(source, output):
    path = next(source.glob("*.safetensors"))
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    try:
        convert(source, output, resume=True)
    finally:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    "resume", [changed_recipe, changed_shard_size, changed_version, changed_source]
)
def test_other_conversion_is_not_resumed_and_nothing_is_lost(source, tmp_path, whole, resume):
    interrupted(source, tmp_path / "out")
    with pytest.raises(OutputError, match="another conversion"):
        resume(source, tmp_path / "out")
    convert(source, tmp_path / "out", resume=True)
    assert digests(tmp_path / "out") == whole


def rewrite_with_its_time(path):
    """As `cp -p` or `rsync` repair a file: other content, the same size and time."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[-1000:] = data[-2000:-1000]
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)


def test_file_of_the_source_that_is_repaired_meanwhile_is_read_again(tmp_path):
    source = write_tiny_checkpoint(tmp_path / "source", tiny_config("deepseek_v3"))
    partial = interrupted(source, tmp_path / "out")
    finished = {path.name for path in partial.glob("*.safetensors")}
    for path in source.glob("*.safetensors"):
        rewrite_with_its_time(path)
    convert(source, tmp_path / "out", resume=True)
    convert(source, tmp_path / "anew")
    assert digests(tmp_path / "out") == digests(tmp_path / "anew")
    assert finished


def finished_files(folder):
    return {path.name: path.stat().st_ino for path in folder.glob("*.safetensors")}


def test_finished_files_are_kept_where_nobody_touched_their_source(source, tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="kimi_convert")
    finished = finished_files(interrupted(source, tmp_path / "out"))
    convert(source, tmp_path / "out", resume=True)
    assert len(finished) == 3
    assert finished.items() <= finished_files(tmp_path / "out").items()
    assert not caplog.messages


def test_source_with_other_rights_costs_time_alone(source, tmp_path, whole, caplog):
    caplog.set_level(logging.WARNING, logger="kimi_convert")
    interrupted(source, tmp_path / "out")
    for path in source.glob("*.safetensors"):
        path.chmod(0o640)
    convert(source, tmp_path / "out", resume=True)
    assert digests(tmp_path / "out") == whole
    assert "3 of 3 finished files are made again: their source was touched" in caplog.text


def spoil(partial):
    path = next(partial.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def shorten(partial):
    os.truncate(next(partial.glob("*.safetensors")), 100)


def lose(partial):
    next(partial.glob("*.safetensors")).unlink()


def tear_the_journal(partial):
    path = partial / JOURNAL_FILE
    path.write_bytes(path.read_bytes()[:-10])


def leave_rubbish(partial):
    (partial / "model-00006-of-00006.safetensors").write_bytes(b"half")


@pytest.mark.parametrize("damage", [spoil, shorten, lose, tear_the_journal, leave_rubbish])
def test_finished_file_that_is_not_whole_is_written_again(source, tmp_path, whole, damage):
    damage(interrupted(source, tmp_path / "out"))
    convert(source, tmp_path / "out", resume=True)
    assert digests(tmp_path / "out") == whole


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        '{"name": "../../x", "nbytes": 1, "sha256": "", "tensors": {}, "notes": {}}',
        '{"name": "x", "nbytes": "1", "sha256": "", "tensors": {}, "notes": {}}',
        '{"moving": 3}',
    ],
)
def test_journal_that_nobody_wrote_is_refused(source, tmp_path, line):
    partial = interrupted(source, tmp_path / "out")
    with (partial / JOURNAL_FILE).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(OutputError, match="journal"):
        convert(source, tmp_path / "out", resume=True)


def test_full_disk_on_resume_leaves_the_finished_files(source, tmp_path, whole, monkeypatch):
    interrupted(source, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("kimi_convert.checkpoints.disk.free_bytes", lambda _: 10)
        with pytest.raises(ResourceError, match="disk space"):
            convert(source, tmp_path / "out", resume=True)
    convert(source, tmp_path / "out", resume=True)
    assert digests(tmp_path / "out") == whole


def test_disk_that_fills_up_leaves_the_finished_files_alone(source, tmp_path, whole, monkeypatch):
    room = 100_000

    def write(descriptor, data):
        nonlocal room
        room -= len(data)
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole_write(descriptor, data)

    whole_write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(ResourceError, match="cannot write") as caught:
            convert(source, tmp_path / "out")
    assert caught.value.exit_code == 5
    assert "No space left" in caught.value.found
    names = {path.name for path in (tmp_path / "out" / PARTIAL_FOLDER).iterdir()}
    finished = {name for name in names if name.endswith(".safetensors")}
    assert finished
    assert names == {"lock", JOURNAL_FILE, *finished}
    convert(source, tmp_path / "out", resume=True)
    assert digests(tmp_path / "out") == whole


def test_too_little_memory_is_found_before_the_first_byte(source, tmp_path, monkeypatch):
    monkeypatch.setattr("kimi_convert.conversion.memory.free_memory_bytes", lambda: 10**6)
    with pytest.raises(ResourceError, match="not enough memory") as caught:
        convert(source, tmp_path / "out")
    assert caught.value.exit_code == 5
    assert "1000000 bytes" in caught.value.found
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["time", "content"])
def test_source_that_changes_during_the_run_is_detected(tmp_path, how):
    source = write_tiny_checkpoint(tmp_path / "source", tiny_config("deepseek_v3"))
    last = sorted(source.glob("*.safetensors"))[-1]

    def change(event):
        if event.done:
            if how == "time":
                os.utime(last)
            else:
                with last.open("ab") as file:
                    file.write(b"more")

    with pytest.raises(CheckpointError, match="changed while it was in use") as caught:
        convert(source, tmp_path / "out", on_progress=change)
    assert caught.value.exit_code == 3


# A process that starts a conversion once for each number it is given, each time in a child that
# sends itself SIGKILL before the call of that number, counted over every call that changes the
# disk. It tells the child's signal, and waits for a line before the next.
KILLED = """
import os, signal, sys
from pathlib import Path
import kimi_convert.conversion.engine as engine

kill_at, calls = -1, 0

def counted(function):
    def call(*args, **kwargs):
        global calls
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        calls += 1
        return function(*args, **kwargs)
    return call

for owner, name in ((os, "write"), (os, "fsync"), (os, "ftruncate"),
                    (Path, "mkdir"), (Path, "rename"), (Path, "replace"), (Path, "unlink"),
                    (Path, "rmdir")):
    setattr(owner, name, counted(getattr(owner, name)))

for kill_at in map(int, sys.argv[3].split(",")):
    pid = os.fork()
    if not pid:
        engine.convert_checkpoint(sys.argv[1], sys.argv[2], max_shard_bytes=50_000)
        print(calls, flush=True)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    print(os.WTERMSIG(status), flush=True)
    sys.stdin.readline()
"""


def start(source, output, points):
    return subprocess.Popen(
        [sys.executable, "-c", KILLED, source, output, ",".join(map(str, points))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_killed_at_fifty_points_never_half_and_resumed_to_the_same_bytes(source, tmp_path, whole):
    told, _ = start(source, tmp_path / "counted", [-1]).communicate("\n")
    calls = int(told.split()[0])
    points = sorted(random.Random(5).sample(range(calls), 44)) + list(range(calls - 6, calls))
    with start(source, tmp_path / "out", points) as process:
        kept = _resumed_after_each(process, points, source, tmp_path, whole)
    assert kept > 30


def _resumed_after_each(process, points, source, tmp_path, whole):
    kept = 0
    for point in points:
        assert process.stdout.readline() == f"{int(signal.SIGKILL)}\n", point
        names = {path.name for path in (tmp_path / "out").glob("*")}
        journal = tmp_path / "out" / PARTIAL_FOLDER / JOURNAL_FILE
        kept += journal.exists()
        if "model.safetensors.index.json" in names:  # the last one moved: all is in place
            assert names - {PARTIAL_FOLDER} == set(whole)
        else:
            with pytest.raises(CheckpointError):
                open_index(tmp_path / "out")
        if set(whole) <= names and not journal.exists():  # killed while it cleaned up
            shutil.rmtree(tmp_path / "out" / PARTIAL_FOLDER, ignore_errors=True)
        else:
            convert(source, tmp_path / "out", resume=True)
        assert digests(tmp_path / "out") == whole, point
        shutil.rmtree(tmp_path / "out")
        process.stdin.write("\n")
        process.stdin.flush()
    return kept


def test_second_run_is_refused_with_its_owner_and_a_dead_one_is_replaced(source, tmp_path, whole):
    code = (
        "import sys, time\n"
        "import kimi_convert.conversion.engine as engine\n"
        "def wait(event):\n"
        "    if event.done:\n"
        "        print('busy', flush=True)\n"
        "        time.sleep(60)\n"
        "engine.convert_checkpoint(sys.argv[1], sys.argv[2], on_progress=wait)\n"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", code, source, tmp_path / "out"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout.readline() == "busy\n"
        for resume in (False, True):
            with pytest.raises(OutputError, match="another process") as caught:
                convert(source, tmp_path / "out", resume=resume)
            assert f"process {first.pid} on " in caught.value.found
    finally:
        first.kill()
        first.communicate()
    convert(source, tmp_path / "out")
    assert digests(tmp_path / "out") == whole


@pytest.mark.slow
def test_several_processes_give_the_same_bytes_and_can_be_resumed(source, tmp_path, whole):
    convert(source, tmp_path / "four", runner=Processes(4))
    assert digests(tmp_path / "four") == whole
    interrupted(source, tmp_path / "out")
    convert(source, tmp_path / "out", resume=True, runner=Processes(2))
    assert digests(tmp_path / "out") == whole


@pytest.mark.slow
def test_program_without_a_guard_is_not_run_again_in_every_worker(source, tmp_path, whole):
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "from kimi_convert.conversion.engine import convert_checkpoint\n"
        "from kimi_convert.conversion.runners import Processes\n"
        "convert_checkpoint(*sys.argv[1:], max_shard_bytes=50_000, runner=Processes(2))\n"
    )
    subprocess.run([sys.executable, program, source, tmp_path / "out"], check=True)
    assert digests(tmp_path / "out") == whole


@pytest.mark.slow
def test_worker_that_is_killed_ends_the_run_and_its_finished_files_stay(source, tmp_path, whole):
    def kill_all(event):
        if event.done:
            for worker in multiprocessing.active_children():
                worker.kill()

    with pytest.raises(ResourceError, match="worker process died"):
        convert(source, tmp_path / "out", runner=Processes(2), on_progress=kill_all)
    convert(source, tmp_path / "out", resume=True)
    assert digests(tmp_path / "out") == whole


@pytest.mark.slow
def test_error_in_a_worker_is_raised_here_as_it_is(tmp_path):
    source = write_tiny_checkpoint(tmp_path / "source", tiny_config("deepseek_v3"))
    with pytest.raises(CheckpointError, match="changed") as caught:
        convert(
            source,
            tmp_path / "out",
            runner=Processes(2),
            on_progress=lambda _: os.utime(next(source.glob("*.safetensors"))),
        )
    assert caught.value.hint
    assert json.loads(json.dumps(caught.value.to_json()))["error"]["exit_code"] == 3
