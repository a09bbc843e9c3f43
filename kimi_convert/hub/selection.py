"""Which files of a repository are wanted, and whether their names are safe to make paths of.

By default the weights that the index names, the configuration, the tokenizer and the terms: no
pickle and no code. Names are the repository's, so each is checked before it becomes a path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from kimi_convert.checkpoints.index import PICKLE_SUFFIXES, SINGLE_FILE
from kimi_convert.checkpoints.manifest import ABOUT_FILES, SMALL_CONTENT_FILES
from kimi_convert.checkpoints.messages import listed, quoted
from kimi_convert.checkpoints.weight_map import INDEX_FILE, parse_weight_map
from kimi_convert.errors import CheckpointError
from kimi_convert.hub.listing import RemoteFile
from kimi_convert.hub.remote import Snapshot

_SMALL_FILES = (*SMALL_CONTENT_FILES, *ABOUT_FILES)
_MAX_PATH_BYTES = 1024
_MAX_PART_BYTES = 255
_HOSTILE = "Do not use this repository unless you know who made it."


@dataclass(frozen=True, slots=True)
class Selection:
    """What is wanted of a snapshot, and how much is left out and why."""

    files: tuple[RemoteFile, ...]
    left_out: tuple[tuple[str, str], ...]  # path, reason

    @property
    def nbytes(self) -> int:
        """Bytes of all wanted files."""
        return sum(file.nbytes for file in self.files)


def select(
    snapshot: Snapshot,
    read: Callable[[RemoteFile], bytes],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Selection:
    """Choose the files to fetch; the index is read and checked first.

    Args:
        snapshot: the repository at a commit.
        read: gives the content of a small file.
        include: patterns of paths that are wanted instead of the default.
        exclude: patterns of paths that are not wanted.

    Raises:
        CheckpointError: there are no safetensors weights, the index names something else than
            files of this repository, or a wanted path is not safe.
    """
    shards = shard_files(snapshot, read)
    default = {*_SMALL_FILES, *shards}
    wanted: list[RemoteFile] = []
    left_out: list[tuple[str, str]] = []
    for path, file in sorted(snapshot.files.items()):
        if include and not _matches(path, include):
            left_out.append((path, "not included"))
        elif _matches(path, exclude):
            left_out.append((path, "excluded"))
        elif not include and path not in default:
            left_out.append((path, _reason(path)))
        else:
            check_path(path, where=snapshot.name)
            wanted.append(file)
    if not wanted:
        raise CheckpointError(
            "no file of the repository is wanted",
            where=snapshot.name,
            expected=f"files that match {', '.join(map(quoted, include)) or 'the default'}",
            found=listed(sorted(snapshot.files)) or "an empty repository",
        )
    return Selection(tuple(wanted), tuple(left_out))


def shard_files(snapshot: Snapshot, read: Callable[[RemoteFile], bytes]) -> list[str]:
    """Return the names of the files of weights, all of which the repository has.

    Raises:
        CheckpointError: no safetensors weights, or an index that is not valid.
    """
    index = snapshot.files.get(INDEX_FILE)
    if index is None:
        if SINGLE_FILE in snapshot.files:
            return [SINGLE_FILE]
        raise _no_weights(snapshot)
    where = f"{snapshot.name}: {INDEX_FILE}"
    shards = parse_weight_map(read(index), where=where).shards
    missing = [name for name in shards if name not in snapshot.files]
    if missing:
        raise CheckpointError(
            f"{len(missing)} files that the index names are not in the repository",
            where=where,
            found=listed(missing),
            hint="The upload may not be finished: try another revision.",
        )
    return shards


def check_path(path: str, *, where: str) -> None:
    """Refuse a path that could lead out of the folder, hide, or steer a terminal.

    Raises:
        CheckpointError: the path is one of these.
    """
    parts = path.split("/")
    safe = (
        path.isprintable()
        and len(path.encode()) <= _MAX_PATH_BYTES
        and not {"", ".", ".."}.intersection(parts)
        and all(len(part.encode()) <= _MAX_PART_BYTES for part in parts)
        and "\\" not in path
        and ":" not in path
        and parts[0] not in (".cache", ".git", ".kimi-convert-partial")
    )
    if not safe:
        raise CheckpointError(
            "repository holds a file whose name is not safe",
            where=where,
            expected="a plain relative path, not below .cache or .git",
            found=quoted(path),
            hint=_HOSTILE + " Or leave the file out with --exclude.",
        )


def _matches(path: str, patterns: Iterable[str]) -> bool:
    """Tell whether a path matches one of the patterns; one that ends in "/" means a folder."""
    return any(
        fnmatchcase(path, f"{pattern}*" if pattern.endswith("/") else pattern)
        for pattern in patterns
    )


def _reason(path: str) -> str:
    if path.endswith(PICKLE_SUFFIXES):
        return "a pickle, which can run any code"
    if path.endswith((".py", ".sh", ".so")):
        return "code"
    if path.endswith(".safetensors"):
        return "not named by the index"
    return "not part of a checkpoint" if "/" not in path else "in a folder"


def _no_weights(snapshot: Snapshot) -> CheckpointError:
    paths = sorted(snapshot.files)
    pickles = [path for path in paths if path.endswith(PICKLE_SUFFIXES)]
    if pickles:
        return CheckpointError(
            "weights are stored as pickle files, which can run any code when they are loaded",
            where=snapshot.name,
            found=listed(pickles),
            hint="Look for a branch or pull request with safetensors: --revision refs/pr/1.",
        )
    shards = [path for path in paths if PurePosixPath(path).suffix == ".safetensors"]
    return CheckpointError(
        "repository holds no checkpoint in safetensors format",
        where=snapshot.name,
        expected=f"{INDEX_FILE} or {SINGLE_FILE}",
        found=listed(shards or paths) or "no files",
        hint="With --include, any file can be fetched.",
    )
