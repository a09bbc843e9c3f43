"""Claiming a folder: who may, who may not, and what becomes of the leftovers of the dead."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
from pathlib import Path

import pytest

from kimi_convert.checkpoints import staging as staging_module
from kimi_convert.checkpoints.staging import LOCK_FILE, PARTIAL_FOLDER, claim_folder
from kimi_convert.errors import KimiConvertError, OutputError, ResourceError
from tests.unit.checkpoints.raw_files import names_in, open_descriptors


def refused(folder, *, source=None, error: type[KimiConvertError] = OutputError):
    """Claim in vain; what was there before is there after, and no descriptor leaks."""
    before = open_descriptors()
    with pytest.raises(error) as caught:
        claim_folder(Path(folder), source=source)
    assert open_descriptors() == before
    assert caught.value.exit_code == error.exit_code
    return caught.value


def test_claim_makes_the_partial_folder_and_close_removes_only_it(tmp_path):
    claimed = claim_folder(tmp_path / "a" / "out", source=None)
    assert claimed.path == tmp_path / "a" / "out" / PARTIAL_FOLDER
    assert names_in(claimed.path) == [LOCK_FILE]
    (claimed.path / "half").write_bytes(b"x")
    claimed.close()
    assert names_in(tmp_path / "a" / "out") == []


def test_discard_removes_the_folders_that_were_made(tmp_path):
    claim_folder(tmp_path / "a" / "out", source=None).discard()
    assert names_in(tmp_path) == []


def test_discard_keeps_a_made_folder_that_someone_else_uses(tmp_path):
    claimed = claim_folder(tmp_path / "a" / "out", source=None)
    (tmp_path / "a" / "mine").touch()
    claimed.discard()
    assert names_in(tmp_path / "a") == ["mine"]


@pytest.mark.parametrize("content", ["file", "folder", "link", ".hidden"])
def test_folder_that_is_not_empty_is_refused_and_kept(tmp_path, content):
    path = tmp_path / "out" / content
    path.parent.mkdir()
    {"folder": path.mkdir, "link": lambda: path.symlink_to("x")}.get(content, path.touch)()
    error = refused(tmp_path / "out")
    assert "not empty" in str(error)
    assert repr(content) in error.found
    assert names_in(tmp_path / "out") == [content]


def test_half_moved_output_of_a_killed_run_is_refused_with_what_to_do(tmp_path):
    (tmp_path / PARTIAL_FOLDER).mkdir()
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    error = refused(tmp_path)
    assert "not empty" in str(error)
    assert "Remove the folder" in error.hint
    assert len(names_in(tmp_path)) == 2


def test_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").write_bytes(b"precious")
    assert "is a file" in str(refused(tmp_path / "out"))
    assert "is a file" in str(refused(tmp_path / "out" / "below"))
    assert (tmp_path / "out").read_bytes() == b"precious"


@pytest.mark.parametrize("path", ["a\0b", "loop"], ids=["NUL", "loop of links"])
def test_unusable_path_is_refused(tmp_path, path):
    (tmp_path / "loop").symlink_to("loop")
    assert "not a usable path" in str(refused(tmp_path / path))


def test_output_equal_to_the_source_is_refused(tmp_path):
    assert "is the source" in str(refused(tmp_path, source=tmp_path))
    assert "is the source" in str(refused(tmp_path / "x" / "..", source=tmp_path))


def test_output_inside_the_source_is_refused(tmp_path):
    assert "lies inside" in str(refused(tmp_path / "a" / "out", source=tmp_path))
    assert names_in(tmp_path) == []


def test_output_that_holds_the_source_is_refused(tmp_path):
    (tmp_path / "a" / "in").mkdir(parents=True)
    assert "holds the source" in str(refused(tmp_path, source=tmp_path / "a" / "in"))


def test_relation_to_the_source_is_seen_through_links(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to("in")
    assert "is the source" in str(refused(tmp_path / "link", source=tmp_path / "in"))
    assert "is the source" in str(refused(tmp_path / "in", source=tmp_path / "link"))
    assert "lies inside" in str(refused(tmp_path / "link" / "out", source=tmp_path / "in"))


def test_one_folder_under_two_real_names_is_seen(tmp_path, monkeypatch):
    """As with bind mounts, or on a file system that ignores case; simulated by `samefile`."""
    (tmp_path / "in").mkdir()
    monkeypatch.setattr(Path, "samefile", lambda one, two: {one.name, two.name} == {"IN", "in"})
    assert "is the source" in str(refused(tmp_path / "IN", source=tmp_path / "in"))
    assert "lies inside" in str(refused(tmp_path / "IN" / "out", source=tmp_path / "in"))


def test_sibling_of_the_source_with_a_longer_name_is_taken(tmp_path):
    (tmp_path / "in").mkdir()
    claim_folder(tmp_path / "in-2", source=tmp_path / "in").close()


def test_source_that_does_not_exist_is_no_obstacle(tmp_path):
    claim_folder(tmp_path / "out", source=tmp_path / "none").discard()


def test_folder_in_use_is_refused_with_its_owner(tmp_path):
    claimed = claim_folder(tmp_path / "out", source=None)
    error = refused(tmp_path / "out")
    assert "another process" in str(error)
    assert f"process {os.getpid()} on " in error.found
    assert names_in(claimed.path) == [LOCK_FILE]
    claimed.close()
    claim_folder(tmp_path / "out", source=None).close()


def test_leftovers_of_a_dead_process_are_removed(tmp_path):
    partial = tmp_path / PARTIAL_FOLDER
    (partial / "sub").mkdir(parents=True)
    (partial / "sub" / "file").touch()
    (partial / "half").write_bytes(b"x" * 1000)
    (partial / LOCK_FILE).write_bytes(b"process 99999999 on a host with a very long name")
    outside = tmp_path.with_name("outside")
    outside.mkdir()
    (outside / "kept").touch()
    (partial / "link").symlink_to(outside)
    claimed = claim_folder(tmp_path, source=None)
    assert names_in(partial) == [LOCK_FILE]
    assert (partial / LOCK_FILE).read_text().startswith(f"process {os.getpid()} on ")
    assert names_in(outside) == ["kept"]
    claimed.discard()
    assert tmp_path.exists()


def test_partial_folder_that_is_a_link_is_refused(tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / PARTIAL_FOLDER).symlink_to(victim)
    refused(tmp_path / "out")
    assert names_in(victim) == ["precious"]


@pytest.mark.parametrize("make", [Path.touch, os.mkfifo], ids=["file", "pipe"])
def test_partial_folder_that_is_none_is_refused(tmp_path, make):
    make(tmp_path / PARTIAL_FOLDER)
    refused(tmp_path)


def test_lock_that_is_a_link_is_refused(tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "out" / PARTIAL_FOLDER).mkdir(parents=True)
    (tmp_path / "out" / PARTIAL_FOLDER / LOCK_FILE).symlink_to(victim)
    refused(tmp_path / "out", error=ResourceError)
    assert victim.read_bytes() == b"precious"


# The tests may run as root, whom no permission bit stops. /proc refuses new folders to everyone;
# a read-only file system is simulated at the call that meets it.
def test_folder_that_cannot_be_made_is_a_resource_error():
    refused("/proc/kimi-convert-output", error=ResourceError)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
@pytest.mark.parametrize("exists", [True, False])
def test_read_only_place_is_a_resource_error(tmp_path, monkeypatch, code, exists):
    folder = tmp_path / "out"
    if exists:
        folder.mkdir()

    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "mkdir", fail)
    assert os.strerror(code) in refused(folder, error=ResourceError).found
    assert folder.exists() is exists


def test_folders_made_before_a_refusal_are_removed(tmp_path, monkeypatch):
    whole = Path.mkdir

    def fail_at_out(path, **options):
        if path.name == "out":
            raise OSError(errno.EROFS, "Read-only file system")
        whole(path, **options)

    monkeypatch.setattr(Path, "mkdir", fail_at_out)
    refused(tmp_path / "a" / "b" / "out", error=ResourceError)
    assert names_in(tmp_path) == []


def test_folder_that_cannot_be_read_is_a_resource_error(tmp_path, monkeypatch):
    whole = Path.iterdir

    def fail_here(path):
        if path == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied")
        return whole(path)

    monkeypatch.setattr(Path, "iterdir", fail_here)
    refused(tmp_path, error=ResourceError)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP])
def test_file_system_without_locks_is_a_resource_error(tmp_path, monkeypatch, code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", fail)
    refused(tmp_path / "out", error=ResourceError)
    monkeypatch.undo()
    claim_folder(tmp_path / "out", source=None).close()


def test_no_space_for_the_lock_is_a_resource_error(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", fail)
    refused(tmp_path / "out", error=ResourceError)
    assert names_in(tmp_path) == []


def test_lock_on_a_removed_file_is_not_taken_for_a_lock(tmp_path, monkeypatch):
    """The last owner finishes between our opening and our locking of its lock file."""
    last = claim_folder(tmp_path / "out", source=None)
    whole = staging_module._open_lock_file

    def owner_finishes_now(partial):
        lock = whole(partial)
        monkeypatch.setattr(staging_module, "_open_lock_file", whole)
        last.close()
        return lock

    monkeypatch.setattr(staging_module, "_open_lock_file", owner_finishes_now)
    claimed = claim_folder(tmp_path / "out", source=None)
    assert os.path.samestat(os.fstat(claimed.lock), (claimed.path / LOCK_FILE).stat())
    claimed.close()


@pytest.mark.parametrize("removed", ["partial", "output"])
def test_folder_that_vanishes_while_it_is_claimed_is_made_again(tmp_path, monkeypatch, removed):
    whole = staging_module._open_lock_file

    def vanish_first(partial):
        monkeypatch.setattr(staging_module, "_open_lock_file", whole)
        shutil.rmtree(partial if removed == "partial" else partial.parent)
        return whole(partial)

    monkeypatch.setattr(staging_module, "_open_lock_file", vanish_first)
    claimed = claim_folder(tmp_path / "out", source=None)
    assert claimed.path.exists()
    claimed.discard()
    assert names_in(tmp_path) == []


def test_folder_that_keeps_vanishing_is_given_up(tmp_path, monkeypatch):
    def vanish(_):
        raise FileNotFoundError

    monkeypatch.setattr(staging_module, "_open_lock_file", vanish)
    assert "keeps changing" in str(refused(tmp_path / "out"))
    assert names_in(tmp_path) == []


def test_output_that_another_process_finished_meanwhile_is_not_touched(tmp_path, monkeypatch):
    whole = staging_module._open_lock_file

    def finished_now(partial):
        (partial.parent / "config.json").write_bytes(b"whole")
        return whole(partial)

    monkeypatch.setattr(staging_module, "_open_lock_file", finished_now)
    assert "not empty" in str(refused(tmp_path / "out"))
    assert names_in(tmp_path / "out") == ["config.json"]


def test_leftovers_that_cannot_be_removed_do_not_hide_the_result(tmp_path, monkeypatch, caplog):
    claimed = claim_folder(tmp_path / "out", source=None)
    (claimed.path / "half").touch()

    def fail(*_, **__):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(Path, "unlink", fail)
    before = open_descriptors()
    with caplog.at_level(logging.WARNING):
        claimed.close()
    assert "could not be removed" in caplog.text
    assert open_descriptors() == before - 1
