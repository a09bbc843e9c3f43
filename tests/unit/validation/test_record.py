"""validation.json: of which bytes a validation is."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from kimi_convert.checkpoints.manifest import content_files, hash_files
from kimi_convert.errors import CheckpointError
from kimi_convert.validation import ValidationOptions, validate_checkpoint
from kimi_convert.validation.options import Check
from kimi_convert.validation.record import read_record, write_record
from kimi_convert.validation.report import Finding, Severity
from tests.tiny import tiny_config, write_tiny_checkpoint


@pytest.fixture
def folder(tmp_path):
    return write_tiny_checkpoint(tmp_path / "tiny", tiny_config("kimi_linear"))


def report_of(folder):
    options = ValidationOptions(checks=frozenset({Check.VALUES}))
    return validate_checkpoint(folder, options=options)


def hashed(folder):
    return hash_files(folder, content_files(folder))


def test_record_covers_the_files_as_they_were(folder):
    write_record(report_of(folder), folder)
    record = read_record(folder)
    assert record.passed
    assert record.covers(hashed(folder))


@pytest.mark.parametrize("name", ["config.json", "NOTICE"])
def test_changed_or_added_file_is_not_covered(folder, name):
    write_record(report_of(folder), folder)
    with (folder / name).open("a", encoding="ascii") as file:
        file.write("\n")
    assert not read_record(folder).covers(hashed(folder))


def test_card_and_notes_do_not_count(folder):
    write_record(report_of(folder), folder)
    (folder / "README.md").write_text("words", encoding="ascii")
    (folder / "notes.txt").write_text("words", encoding="ascii")
    assert read_record(folder).covers(hashed(folder))


def test_failed_validation_removes_the_record(folder):
    report = report_of(folder)
    write_record(report, folder)
    error = Finding(Severity.ERROR, "values", "a", "b")
    assert write_record(replace(report, findings=(error,)), folder) is None
    assert read_record(folder) is None


def test_record_holds_no_path(folder):
    report = report_of(folder)
    warning = Finding(Severity.WARNING, "values", str(folder / "config.json"), "b")
    write_record(replace(report, teacher=str(folder), findings=(warning,)), folder)
    text = (folder / "validation.json").read_text("utf-8")
    assert str(folder.parent) not in text
    assert json.loads(text)["report"]["checkpoint"] == "tiny"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2, "files": {}, "report": {}}'])
def test_other_content_is_refused(folder, text):
    (folder / "validation.json").write_text(text, encoding="ascii")
    with pytest.raises(CheckpointError):
        read_record(folder)
