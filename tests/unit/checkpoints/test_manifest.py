"""Which files are content, and the sums of them."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from kimi_convert.checkpoints.manifest import content_files, hash_files, sums_text
from kimi_convert.errors import CheckpointError
from tests.tiny import tiny_config, write_tiny_checkpoint


@pytest.fixture
def folder(tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "tiny", tiny_config("kimi_linear"))
    for name in ("README.md", "notes.txt", "LICENSE", "modeling.py", "model.sig", ".env"):
        (folder / name).write_text(name, encoding="ascii")
    return folder


def test_content_is_weights_and_what_belongs_to_them(folder):
    assert content_files(folder) == (
        "LICENSE",
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    )


def test_sums_are_read_by_sha256sum(folder):
    text = sums_text(hash_files(folder, content_files(folder)))
    (folder / "SHA256SUMS").write_text(text, encoding="ascii")
    tool = shutil.which("sha256sum")
    done = subprocess.run([tool, "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.count(": OK") == 5


def test_progress_counts_every_byte(folder):
    events = []
    hashed = hash_files(folder, content_files(folder), on_progress=events.append)
    assert events[-1].done == events[-1].total == sum(file.nbytes for file in hashed.values())


def test_folder_in_the_place_of_a_file_is_refused(folder):
    (folder / "tokenizer.json").mkdir()
    with pytest.raises(CheckpointError, match="not a plain file"):
        content_files(folder)
