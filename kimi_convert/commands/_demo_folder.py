"""The folder of the demo: a second run replaces what the first one made, and nothing else.

A record in the folder lists every file that the demo made, with its size and time, and the places
that it is filling just now. Files are removed only if each one found is as listed, or lies in a
place that a killed or interrupted demo was filling.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import cast

from kimi_convert.checkpoints.disk import disk_errors
from kimi_convert.checkpoints.strict_json import as_object, parse_object
from kimi_convert.errors import CheckpointError, OutputError

RECORD = ".kimi-convert-demo.json"
_HINT = "Choose another folder with --output, or remove this one."


@dataclass(slots=True)
class DemoFolder:
    """A folder that the demo may fill; made by `open_demo_folder`."""

    path: Path
    replaced: bool  # whether an earlier demo's output was removed
    _made: dict[str, list[int]] = field(default_factory=dict[str, list[int]])

    @contextmanager
    def making(self, *places: Path) -> Generator[None]:
        """Own what comes to lie at these places, files or folders, however the block ends."""
        self.record(unfinished=places)
        yield
        for place in places:
            for file in [place] if place.is_file() else sorted(place.rglob("*")):
                if file.is_file():
                    self._made[self._name(file)] = _stamp(file)
        self.record()

    def record(self, *, unfinished: tuple[Path, ...] = ()) -> None:
        """Write down what is the demo's own."""
        names = [self._name(place) for place in unfinished]
        text = json.dumps({"files": self._made, "unfinished": names}, indent=2)
        (self.path / RECORD).write_text(f"{text}\n", encoding="utf-8")

    def _name(self, place: Path) -> str:
        return place.relative_to(self.path).as_posix()


def open_demo_folder(path: Path) -> DemoFolder:
    """Make the folder, or empty it if all it holds is an earlier demo's output.

    Raises:
        OutputError: it holds anything else; nothing is removed then.
        ResourceError: it cannot be made or written.
    """
    if path.exists() and not path.is_dir():
        raise OutputError("output is not a folder", where=path, hint=_HINT)
    found = {
        place.relative_to(path).as_posix()
        for place in path.rglob("*")
        if place.is_symlink() or not place.is_dir()
    }
    if found:
        _check_own(path, found)
    with disk_errors(path, doing="prepare the folder of the demo"):
        if found:
            _remove(path)
        path.mkdir(parents=True, exist_ok=True)
        folder = DemoFolder(path, replaced=bool(found))
        folder.record()
    return folder


def _check_own(path: Path, found: set[str]) -> None:
    record = _read_record(path) if RECORD in found else _Record()
    foreign = sorted(name for name in found - {RECORD} if not record.owns(name, path))
    if foreign or RECORD not in found:
        raise OutputError(
            "output folder holds files that the demo did not make",
            where=path,
            found=", ".join(map(ascii, foreign[:5])),
            hint=_HINT,
        )


@dataclass(frozen=True, slots=True)
class _Record:
    """What an earlier demo wrote down; without it, no file counts as the demo's own."""

    files: Mapping[str, object] = field(default_factory=dict[str, object])
    unfinished: Sequence[object] = ()

    def owns(self, name: str, folder: Path) -> bool:
        """Tell whether a file is as it was made, or was being made when the demo ended."""
        places = {name, *map(str, PurePosixPath(name).parents[:-1])}  # the last is the folder
        return self.files.get(name) == _stamp(folder / name) or any(
            place in places for place in self.unfinished
        )


def _read_record(path: Path) -> _Record:
    try:
        document = parse_object((path / RECORD).read_bytes(), where=path / RECORD)
    except CheckpointError:
        return _Record()
    unfinished = document.get("unfinished")
    return _Record(
        as_object(document.get("files")) or {},
        cast("list[object]", unfinished) if isinstance(unfinished, list) else (),
    )


def _remove(path: Path) -> None:
    """Remove what `_check_own` has found to be the demo's: every file, and then the folders."""
    places = sorted(path.rglob("*"), key=lambda place: len(PurePosixPath(place).parts))
    for place in reversed(places):
        if place.is_dir() and not place.is_symlink():
            place.rmdir()
        else:
            place.unlink()


def _stamp(file: Path) -> list[int]:
    status = file.lstat()
    return [status.st_size, status.st_mtime_ns]
