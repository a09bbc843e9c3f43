"""The demo's folder: made again and again, and never at the cost of somebody's file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kimi_convert.commands._demo_folder import RECORD, open_demo_folder
from kimi_convert.errors import OutputError, ResourceError


def run_demo(path):
    folder = open_demo_folder(path)
    with folder.making(path / "hybrid", path / "report.json"):
        (path / "hybrid" / "deep").mkdir(parents=True)
        (path / "hybrid" / "deep" / "weights").write_text("w")
        (path / "report.json").write_text("{}")
    return folder


def interrupt_demo(path):
    """Leave a demo while it fills `exported` and `exported.work`, the latter not begun."""
    folder = run_demo(path)
    with (
        pytest.raises(KeyboardInterrupt),
        folder.making(path / "exported", path / "exported.work"),
    ):
        (path / "exported" / "deep").mkdir(parents=True)
        (path / "exported" / "deep" / "half").write_text("h")
        raise KeyboardInterrupt


def names(path):
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


def test_new_folder_is_made_with_its_parents(tmp_path):
    assert not open_demo_folder(tmp_path / "a" / "b").replaced
    assert names(tmp_path / "a" / "b") == [RECORD]


def test_empty_folder_is_used(tmp_path):
    assert not open_demo_folder(tmp_path).replaced


def test_second_run_removes_what_the_first_made(tmp_path):
    run_demo(tmp_path)
    assert open_demo_folder(tmp_path).replaced
    assert names(tmp_path) == [RECORD]


def test_third_run_works_like_the_second(tmp_path):
    run_demo(tmp_path)
    run_demo(tmp_path)
    assert run_demo(tmp_path).replaced


def test_run_after_one_that_was_interrupted_at_once_works(tmp_path):
    open_demo_folder(tmp_path)
    assert open_demo_folder(tmp_path).replaced


def test_run_after_an_interrupted_one_removes_what_that_was_making(tmp_path):
    interrupt_demo(tmp_path)
    assert open_demo_folder(tmp_path).replaced
    assert names(tmp_path) == [RECORD]


@pytest.mark.parametrize("name", ["notes.txt", "hybrid/notes.txt", "exported2", "deep/half"])
def test_file_beside_what_an_interrupted_demo_was_making_is_refused(tmp_path, name):
    interrupt_demo(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    before = names(tmp_path)
    with pytest.raises(OutputError, match="did not make"):
        open_demo_folder(tmp_path)
    assert names(tmp_path) == before


def foreign_file(path):
    (path / "notes.txt").write_text("mine")


def foreign_file_inside(path):
    (path / "hybrid" / "notes.txt").write_text("mine")


def changed_file(path):
    (path / "report.json").write_text("mine")


def rewritten_file(path):
    os.utime(path / "report.json", ns=(1, 1))


def replaced_by_link(path):
    (path / "report.json").unlink()
    (path / "report.json").symlink_to(path / "hybrid" / "deep" / "weights")


def lost_record(path):
    (path / RECORD).unlink()


def damaged_record(path):
    (path / RECORD).write_text("{")


def record_of_another_kind(path):
    (path / RECORD).write_text('{"files": [], "unfinished": {"hybrid": 1}}')


def record_that_claims_the_folder_itself(path):
    (path / RECORD).write_text('{"files": {}, "unfinished": [".", "/", 1, ".."]}')


@pytest.mark.parametrize(
    "touch",
    [
        foreign_file,
        foreign_file_inside,
        changed_file,
        rewritten_file,
        replaced_by_link,
        lost_record,
        damaged_record,
        record_of_another_kind,
        record_that_claims_the_folder_itself,
    ],
)
def test_anything_else_in_the_folder_is_refused_and_everything_stays(tmp_path, touch):
    run_demo(tmp_path)
    touch(tmp_path)
    before = names(tmp_path)
    with pytest.raises(OutputError, match="did not make"):
        open_demo_folder(tmp_path)
    assert names(tmp_path) == before


def test_files_of_someone_without_a_record_are_refused(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(OutputError, match="did not make"):
        open_demo_folder(tmp_path)
    assert names(tmp_path) == ["mine"]


def test_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="not a folder"):
        open_demo_folder(tmp_path / "file")


def test_link_to_a_folder_outside_is_refused_and_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    run_demo(tmp_path / "demo")
    (tmp_path / "demo" / "link").symlink_to(outside, target_is_directory=True)
    with pytest.raises(OutputError):
        open_demo_folder(tmp_path / "demo")
    assert (outside / "mine").read_text() == "mine"


def test_file_that_the_user_removed_is_no_obstacle(tmp_path):
    run_demo(tmp_path)
    (tmp_path / "report.json").unlink()
    assert open_demo_folder(tmp_path).replaced


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs Linux's /sys")
def test_folder_that_cannot_be_made_is_a_resource_error():
    with pytest.raises(ResourceError, match="cannot prepare"):
        open_demo_folder(Path("/sys/kernel/demo"))
