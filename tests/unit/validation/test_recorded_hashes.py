"""What a folder records of itself is read exactly, and never trusted."""

from __future__ import annotations

import json

import pytest

from kimi_convert.errors import CheckpointError
from kimi_convert.validation.recorded_hashes import FileHash, read_recorded_hashes
from tests.unit.validation.build import write_json

A, B = "a" * 64, "b" * 64


def read(folder):
    return list(read_recorded_hashes(folder))


def conversion(files=None, tensors=None, **more):
    return {"format": 1, "files": files or {}, "tensors": tensors or {}, **more}


def test_folder_without_records_has_none(tmp_path):
    assert read(tmp_path) == []


def test_files_and_tensors_of_a_conversion_are_read(tmp_path):
    files = {"config.json": {"sha256": A, "size": 12}}
    tensors = {"x.weight": {"op": "copy", "sources": ["y"], "sha256": B}}
    write_json(tmp_path / "conversion.json", conversion(files, tensors))
    (record,) = read(tmp_path)
    assert record.source == "conversion.json"
    assert record.files == {"config.json": FileHash(A, 12)}
    assert record.tensors == {"x.weight": B}


def test_file_of_weights_is_recorded_by_its_header(tmp_path):
    files = {"model.safetensors": {"header_sha256": A, "size": 12}}
    write_json(tmp_path / "conversion.json", conversion(files))
    (record,) = read(tmp_path)
    assert record.files == {"model.safetensors": FileHash(A, 12, of_header=True)}


def test_hashes_of_an_export_stand_for_those_of_the_conversion(tmp_path):
    before = conversion({"old": {"sha256": A, "size": 1}}, {"x": {"sha256": A}})
    now = {"files": {"new": {"sha256": B, "size": 2}}, "tensors": {"x": {"sha256": B}}}
    write_json(tmp_path / "conversion.json", {**before, "export": now})
    (record,) = read(tmp_path)
    assert record.files == {"new": FileHash(B, 2)}
    assert record.tensors == {"x": B}


def test_lines_of_sha256sum_are_read(tmp_path):
    text = f"{A}  config.json\n{B.upper()} *model 1.safetensors\n"
    (tmp_path / "SHA256SUMS").write_text(text)
    (record,) = read(tmp_path)
    assert record.files == {
        "config.json": FileHash(A, None),
        "model 1.safetensors": FileHash(B, None),
    }
    assert record.tensors == {}


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", ".", "", "a\nb"])
def test_name_that_is_not_a_plain_file_is_refused(name, tmp_path):
    write_json(tmp_path / "conversion.json", conversion({name: {"sha256": A, "size": 1}}))
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path)
    assert caught.value.where == str(tmp_path / "conversion.json")


@pytest.mark.parametrize(
    "document",
    [
        pytest.param({"format": 1, "tensors": {}}, id="no-files"),
        pytest.param({"format": 1, "files": {}}, id="no-tensors"),
        pytest.param(conversion({"a": 3}), id="file-is-a-number"),
        pytest.param(conversion({"a": {"size": 1}}), id="no-hash"),
        pytest.param(conversion({"a": {"sha256": A[1:], "size": 1}}), id="short-hash"),
        pytest.param(conversion({"a": {"sha256": "g" * 64, "size": 1}}), id="not-hex"),
        pytest.param(conversion({"a": {"header_sha256": A[1:], "size": 1}}), id="short-header"),
        pytest.param(conversion({"a": {"sha256": A}}), id="no-size"),
        pytest.param(conversion({"a": {"sha256": A, "size": True}}), id="size-is-true"),
        pytest.param(conversion({"a": {"sha256": A, "size": "1"}}), id="size-is-text"),
        pytest.param(conversion(tensors={"a": A}), id="tensor-is-text"),
        pytest.param(conversion(export=[]), id="export-is-a-list"),
        pytest.param([], id="not-an-object"),
    ],
)
def test_record_of_another_form_is_refused(document, tmp_path):
    (tmp_path / "conversion.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError):
        read(tmp_path)


@pytest.mark.parametrize("line", ["nonsense", A, f"{A}  ../x", f"{A[1:]}  x", f"{A} x"])
def test_sums_of_another_form_are_refused(line, tmp_path):
    (tmp_path / "SHA256SUMS").write_text(line + "\n")
    with pytest.raises(CheckpointError):
        read(tmp_path)


def test_record_that_is_a_folder_is_refused(tmp_path):
    (tmp_path / "conversion.json").mkdir()
    with pytest.raises(CheckpointError):
        read(tmp_path)
