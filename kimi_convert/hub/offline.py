"""What is here already, for HF_HUB_OFFLINE: a listing from names on the disk, not from the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

from kimi_convert.checkpoints.messages import quoted
from kimi_convert.checkpoints.origin import ORIGIN_FILE
from kimi_convert.errors import HubError
from kimi_convert.hub.listing import RemoteFile
from kimi_convert.hub.places import FolderPlace, cache_folder, file_of
from kimi_convert.hub.reference import Reference, is_commit
from kimi_convert.hub.remote import Snapshot

_GO_ONLINE = "Unset HF_HUB_OFFLINE and download it once."


def recorded_snapshot(reference: Reference, local_dir: Path | None) -> Snapshot:
    """Return the commit and the files that earlier downloads have left.

    Args:
        reference: what is asked for.
        local_dir: the folder of the download; None for the Hub's cache.

    Raises:
        HubError: nothing of it is here.
    """
    if local_dir is None:
        return _from_cache(reference, cache_folder())
    return _from_folder(reference, local_dir)


def _from_cache(reference: Reference, cache: Path) -> Snapshot:
    storage = cache / "--".join(("models", *reference.repository.split("/")))
    commit = reference.revision
    if not is_commit(commit):
        try:
            commit = (storage / "refs" / commit).read_text("ascii").strip()
        except (OSError, ValueError) as error:
            raise _not_here(reference, cache) from error
    folder = storage / "snapshots" / commit
    if not is_commit(commit) or not folder.is_dir():
        raise _not_here(reference, cache)
    files: dict[str, RemoteFile] = {}
    for link in folder.rglob("*"):
        path = link.relative_to(folder).as_posix()
        if link.is_symlink() and link.is_file():
            # The name of a blob is the hash of its content.
            files[path] = file_of(path, link.stat().st_size, link.readlink().name)
    return Snapshot(reference, commit, files)


def _from_folder(reference: Reference, folder: Path) -> Snapshot:
    try:
        origin: object = json.loads((folder / ORIGIN_FILE).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise _not_here(reference, folder) from error
    recorded = cast("dict[str, object]", origin) if isinstance(origin, dict) else {}
    commit = recorded.get("commit")
    if (
        recorded.get("repository") != reference.repository
        or not isinstance(commit, str)
        or not is_commit(commit)
        or reference.revision not in (commit, recorded.get("revision"))
    ):
        raise _not_here(reference, folder)
    return Snapshot(reference, commit, FolderPlace(folder).finished_files())


def _not_here(reference: Reference, place: Path) -> HubError:
    return HubError(
        "checkpoint is not here, and HF_HUB_OFFLINE forbids to fetch it",
        where=place,
        found=f"no {quoted(str(reference))}",
        hint=_GO_ONLINE,
    )
