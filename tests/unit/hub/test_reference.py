"""Names on the Hub, told from folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from kimi_convert.errors import UsageError
from kimi_convert.hub.reference import Reference, is_commit, parse_reference, reference_of


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("org/name", Reference("org/name", "main")),
        ("org/name@v1.0", Reference("org/name", "v1.0")),
        ("Org-1/na_me.2@refs/pr/3", Reference("Org-1/na_me.2", "refs/pr/3")),
    ],
)
def test_name_and_revision_are_told_apart(text, reference):
    assert parse_reference(text) == reference
    assert str(reference) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "name",
        "/a/b",
        "a//b",
        "a/b/c",
        "a/..",
        "../a",
        "a/b@",
        "a/b@@",
        "a/b@..",
        "a/.b",
        "a/b.",
    ],
)
def test_other_texts_are_refused(text):
    with pytest.raises(UsageError):
        parse_reference(text)


def test_revision_is_given_once():
    assert parse_reference("a/b@x", revision="x").revision == "x"
    with pytest.raises(UsageError, match="two revisions"):
        parse_reference("a/b@x", revision="y")


@pytest.mark.parametrize("text", ["./a/b", "/a/b", "a", "a/b/c", "~/a", "..", "."])
def test_paths_are_folders(text):
    assert reference_of(text) is None


def test_folder_that_exists_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert reference_of("a/b") == Reference("a/b")
    Path("a/b").mkdir(parents=True)
    assert reference_of("a/b") is None


def test_commit_is_a_full_hash():
    assert is_commit("0" * 40)
    assert not is_commit("0" * 39)
