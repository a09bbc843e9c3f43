"""Which files of weights an unfinished output has finished, so that a later run goes on from them.

One line of JSON each, made durable before the next file is begun. The first line carries a digest
of everything that the bytes depend on; a last line says which files are being moved into place.
A torn line at the end, as a crash leaves it, counts as not written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from kimi_convert.checkpoints.disk import disk_errors, write_all
from kimi_convert.checkpoints.regular_file import open_regular, read_exactly
from kimi_convert.checkpoints.strict_json import as_object, parse_object
from kimi_convert.checkpoints.written import WrittenShard
from kimi_convert.errors import CheckpointError, OutputError

JOURNAL_FILE = "journal.jsonl"
_FORMAT = 3


@dataclass(frozen=True, slots=True)
class FinishedFile:
    """One finished file of weights, and what its maker wants to know of it later."""

    written: WrittenShard
    notes: Mapping[str, str] = field(default_factory=dict[str, str])
    sources: Mapping[str, str] = field(
        default_factory=dict[str, str]
    )  # file it is made of -> state


@dataclass(frozen=True, slots=True)
class JournalState:
    """What a journal says."""

    digest: str
    finished: tuple[FinishedFile, ...]
    moving: tuple[str, ...]  # names of files that may be in place already


class Journal:
    """Appends to the journal of an output that this process owns."""

    def __init__(self, folder: Path, digest: str, finished: Iterable[FinishedFile]) -> None:
        """Begin a journal, with what is finished already."""
        self._path = folder / JOURNAL_FILE
        first = json.dumps({"format": _FORMAT, "digest": digest}) + "\n"
        text = first + "".join(map(_line, finished))
        part = self._path.with_suffix(".part")
        with disk_errors(self._path, doing="write the journal"):
            with part.open("wb") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
            part.replace(self._path)

    def append(self, finished: FinishedFile) -> None:
        """Note a finished file.

        Raises:
            ResourceError: the disk does not take it.
        """
        self._append(_line(finished))

    def moving(self, names: Iterable[str]) -> None:
        """Note that these files are about to be renamed into place."""
        self._append(json.dumps({"moving": list(names)}) + "\n")

    def _append(self, line: str) -> None:
        with disk_errors(self._path, doing="write the journal"):
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            try:
                write_all(descriptor, memoryview(line.encode()))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def read_journal(folder: Path) -> JournalState | None:
    """Read the journal in a folder of unfinished files; None where there is none, or no line.

    Raises:
        OutputError: it is not a journal.
    """
    path = folder / JOURNAL_FILE
    if not os.path.lexists(path):
        return None
    with open_regular(path) as descriptor:
        data = read_exactly(descriptor, os.fstat(descriptor).st_size, offset=0, path=path)
    first, *lines = data.split(b"\n")[:-1] or [b""]  # after the last line break lies a torn line
    if not first:
        return None
    try:
        digest = _text(parse_object(first, where=path), "digest")
        documents = [parse_object(line, where=path) for line in lines]
        moving = [name for one in documents if "moving" in one for name in _texts(one["moving"])]
        finished = tuple(_finished(one) for one in documents if "moving" not in one)
    except (CheckpointError, ValueError) as error:
        raise OutputError(
            "the journal of an interrupted run is damaged",
            where=path,
            found=error,
            hint=f"Remove {folder} to start anew.",
        ) from error
    return JournalState(digest, finished, tuple(moving))


def _line(finished: FinishedFile) -> str:
    written = finished.written
    document = {
        "name": written.name,
        "nbytes": written.nbytes,
        "header": written.header_sha256,
        "tensors": dict(written.tensor_sha256),
        "notes": dict(finished.notes),
        "sources": dict(finished.sources),
    }
    return json.dumps(document) + "\n"


def _finished(document: Mapping[str, object]) -> FinishedFile:
    nbytes = document.get("nbytes")
    if not isinstance(nbytes, int):
        raise ValueError("nbytes is not a number")  # noqa: TRY004  (of a file, not of a caller)
    name = _text(document, "name")
    if name != Path(name).name or name.startswith("."):
        raise ValueError("name is not a plain file name")
    header, tensors = _text(document, "header"), _mapping(document, "tensors")
    written = WrittenShard(name, nbytes, header, tensors)
    return FinishedFile(written, _mapping(document, "notes"), _mapping(document, "sources"))


def _text(document: Mapping[str, object], name: str) -> str:
    value = document.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{name} is not a text")  # noqa: TRY004
    return value


def _texts(value: object) -> list[str]:
    if not isinstance(value, list):
        raise ValueError("moving is not a list")  # noqa: TRY004
    names = cast("list[object]", value)
    return [_text({"moving": name}, "moving") for name in names]


def _mapping(document: Mapping[str, object], name: str) -> dict[str, str]:
    found = as_object(document.get(name))
    if found is None:
        raise ValueError(f"{name} is not an object")
    return {key: _text(found, key) for key in found}
