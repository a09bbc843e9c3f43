"""Files added to a folder: all or none, and over none that is there."""

from __future__ import annotations

import pytest

from kimi_convert.checkpoints.addition import add_files
from kimi_convert.errors import OutputError


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_files_appear_at_the_end(tmp_path):
    with add_files(tmp_path, ("one", "two")) as addition:
        addition.path("one").write_text("1")
        addition.path("two").write_text("2")
        assert not (tmp_path / "one").exists()
    assert content(tmp_path) == {"one": "1", "two": "2"}
    assert (tmp_path / "one").stat().st_nlink == 1


def test_an_exception_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with add_files(tmp_path, ("one", "two")) as addition:
            addition.path("one").write_text("1")
            raise KeyboardInterrupt
    assert content(tmp_path) == {}


def test_a_name_that_is_taken_is_refused_at_once(tmp_path):
    (tmp_path / "two").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        with add_files(tmp_path, ("one", "two")):
            raise AssertionError("not reached")
    assert content(tmp_path) == {"two": "mine"}


def test_a_name_that_is_taken_meanwhile_is_refused_with_all_others(tmp_path):
    with pytest.raises(OutputError, match="exists already"):
        with add_files(tmp_path, ("one", "two")) as addition:
            addition.path("one").write_text("1")
            addition.path("two").write_text("2")
            (tmp_path / "two").write_text("mine")
    assert content(tmp_path) == {"two": "mine"}
