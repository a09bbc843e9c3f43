"""Where a folder came from."""

from __future__ import annotations

import json

import pytest

from kimi_convert.checkpoints.origin import ORIGIN_FILE, Origin, declared_license, read_origin

COMMIT = "0123456789" * 4


def test_snapshot_of_the_cache_has_it_in_its_path(tmp_path):
    folder = tmp_path / "models--org--name" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    assert read_origin(folder) == Origin("org/name", COMMIT)


def test_download_has_it_in_a_file(tmp_path):
    path = tmp_path / ORIGIN_FILE
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"repository": "org/name", "commit": COMMIT}), encoding="ascii")
    assert read_origin(tmp_path) == Origin("org/name", COMMIT)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        json.dumps({"repository": "org/name\nx", "commit": COMMIT}),
        json.dumps({"repository": "org/name", "commit": "main"}),
        json.dumps({"repository": 1, "commit": COMMIT}),
    ],
)
def test_other_files_say_nothing(tmp_path, text):
    path = tmp_path / ORIGIN_FILE
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="ascii")
    assert read_origin(tmp_path) is None


def test_plain_folder_says_nothing(tmp_path):
    assert read_origin(tmp_path) is None
    assert declared_license(tmp_path) is None


@pytest.mark.parametrize(
    ("card", "found"),
    [
        ("---\nlicense: MIT\n---\n", "mit"),
        ("---\r\ntags:\r\n- a\r\nlicense: 'apache-2.0'\r\n---\r\n", "apache-2.0"),
        ("---\nlicense: [a, b]\n---\n", None),
        ("---\nlicense: a: b\n---\n", None),
        ("license: mit\n", None),
        ("---\ntags: []\n---\nlicense: mit\n", None),
        ("---\nlicense: " + "x" * 100 + "\n---\n", None),
    ],
)
def test_licence_is_the_plain_one_of_the_front_matter(tmp_path, card, found):
    (tmp_path / "README.md").write_bytes(card.encode())
    assert declared_license(tmp_path) == found
