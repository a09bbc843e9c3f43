"""validation.json: what validation found, and of which bytes, beside the checkpoint.

So that a folder can tell others, and `publish`, that it was validated as it is now.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kimi_convert.checkpoints.disk import disk_errors
from kimi_convert.checkpoints.manifest import (
    RECORD_FILE,
    HashedFile,
    content_files,
    hash_files,
)
from kimi_convert.checkpoints.regular_file import open_regular, read_exactly
from kimi_convert.checkpoints.strict_json import MAX_JSON_BYTES, as_object, parse_object
from kimi_convert.config.progress import ProgressCallback, ignore_progress
from kimi_convert.errors import CheckpointError
from kimi_convert.validation.report import ValidationReport

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Record:
    """A validation of some bytes."""

    passed: bool
    files: Mapping[str, str]  # name -> SHA-256 in hex
    report: Mapping[str, object]  # as `validate --json` prints it

    def covers(self, files: Mapping[str, HashedFile]) -> bool:
        """Tell whether it is about exactly these files."""
        return dict(self.files) == {name: file.sha256 for name, file in files.items()}


def write_record(
    report: ValidationReport,
    folder: str | Path,
    *,
    on_progress: ProgressCallback = ignore_progress,
) -> Path | None:
    """Write validation.json into the folder that was validated; return its path.

    A validation that failed leaves none, and removes that of an earlier one.

    Args:
        report: what was found.
        folder: the same folder. Its files are hashed once more.
        on_progress: told of bytes.

    Raises:
        CheckpointError: the folder is not a whole checkpoint.
        ResourceError: the folder cannot be written.
    """
    folder = Path(folder)
    path = folder / RECORD_FILE
    if not report.passed:
        with disk_errors(path, doing="remove the record of an earlier validation"):
            path.unlink(missing_ok=True)
        return None
    files = hash_files(folder, content_files(folder), on_progress=on_progress)
    document = {
        "format": FORMAT,
        "files": {name: file.sha256 for name, file in files.items()},
        "report": _without_paths(report.to_json()),
    }
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    fresh = folder / f".{RECORD_FILE}.{os.getpid()}"
    with disk_errors(path, doing="write the record of the validation", nbytes=len(text)):
        try:
            fresh.write_text(text, encoding="utf-8")
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)
    return path


def read_record(folder: Path) -> Record | None:
    """Return the record that a folder has, or None.

    Raises:
        CheckpointError: it has one that is not understood.
    """
    path = folder / RECORD_FILE
    if not path.exists():
        return None
    with open_regular(path) as descriptor:
        size = min(os.fstat(descriptor).st_size, MAX_JSON_BYTES + 1)
        document = parse_object(read_exactly(descriptor, size, offset=0, path=path), where=path)
    files, report = as_object(document.get("files")), as_object(document.get("report"))
    if document.get("format") != FORMAT or files is None or report is None:
        raise CheckpointError(
            "record of a validation is not understood",
            where=path,
            expected=f"format {FORMAT} with files and report",
            hint="Run `kimi-convert validate --record` again.",
        )
    hashes = {name: str(value) for name, value in files.items()}
    return Record(report.get("passed") is True, hashes, report)


def _without_paths(report: dict[str, object]) -> dict[str, object]:
    """Return the report with folders by name alone: where they lay is nobody's business."""
    told = dict(report)
    for field in ("checkpoint", "teacher"):
        value = told[field]
        told[field] = None if value is None else _name(str(value))
    text = as_object(told["text"])
    if text is not None:
        told["text"] = {**text, "path": _name(str(text["path"]))}
    findings = told["findings"]
    if isinstance(findings, list):
        told["findings"] = [_finding_without_path(finding) for finding in findings]
    return told


def _finding_without_path(finding: object) -> object:
    fields = as_object(finding)
    where = None if fields is None else fields.get("where")
    if fields is None or not isinstance(where, str) or not where.startswith(os.sep):
        return finding
    return {**fields, "where": _name(where)}


def _name(path: str) -> str:
    return Path(path).resolve().name
