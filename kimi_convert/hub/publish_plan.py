"""What a publication puts where: decided from the folder and the listing, before anything is sent.

Everything of the folder that belongs to a checkpoint goes up, and nothing else: a file that lies
there by chance (notes, keys, caches) is left out and named.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from kimi_convert.checkpoints.manifest import ABOUT_FILES, HashedFile
from kimi_convert.checkpoints.weight_map import SHARD_SUFFIX
from kimi_convert.hub.listing import RemoteFile

_INDEX_SUFFIX = f"{SHARD_SUFFIX}.index.json"


class Change(StrEnum):
    """What becomes of a file of the repository."""

    UPLOAD = "upload"
    KEEP = "there already"
    REMOVE = "remove"


@dataclass(frozen=True, slots=True)
class LocalFile:
    """One file to publish, with every hash that a listing may have."""

    name: str
    nbytes: int
    sha256: str
    git_sha1: str | None  # of small files; weights are in LFS always

    def is_same(self, remote: RemoteFile | None) -> bool:
        """Tell whether the repository has exactly this content."""
        if remote is None or remote.nbytes != self.nbytes:
            return False
        if remote.sha256 is not None:
            return remote.sha256 == self.sha256
        return self.git_sha1 is not None and remote.git_sha1 == self.git_sha1


@dataclass(frozen=True, slots=True)
class PublishPlan:
    """Every file and what happens to it."""

    files: Mapping[str, LocalFile]
    changes: Mapping[str, Change]  # of these files, and of files of the repository
    left_out: tuple[str, ...]  # in the folder, and not published

    @property
    def upload(self) -> tuple[LocalFile, ...]:
        """The files to send."""
        return tuple(
            file for name, file in self.files.items() if self.changes[name] is Change.UPLOAD
        )

    @property
    def remove(self) -> tuple[str, ...]:
        """The files of the repository to remove."""
        return tuple(n for n, change in self.changes.items() if change is Change.REMOVE)

    @property
    def is_done(self) -> bool:
        """Whether the repository is as the folder already."""
        return all(change is Change.KEEP for change in self.changes.values())

    @property
    def digest(self) -> str:
        """One name for all contents: the same folder gives the same."""
        text = "\n".join(f"{f.sha256} {f.name}" for _, f in sorted(self.files.items()))
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def plan_publication(
    folder: Path,
    hashed: Mapping[str, HashedFile],
    remote: Mapping[str, RemoteFile],
    *,
    texts: Mapping[str, str],
) -> PublishPlan:
    """Compare a folder with a listing.

    Args:
        folder: where the files lie.
        hashed: the files to publish.
        remote: what the branch holds that they go to.
        texts: the files that are, or would be, written for the publication.
    """
    files = {
        name: LocalFile(name, file.nbytes, file.sha256, _git_sha1(folder, file, texts.get(name)))
        for name, file in sorted(hashed.items())
    }
    changes = {
        name: Change.KEEP if file.is_same(remote.get(name)) else Change.UPLOAD
        for name, file in files.items()
    }
    # Weights of another conversion beside these: loaders disagree on which of them they read.
    stale = [n for n in remote if n not in files and n.endswith((SHARD_SUFFIX, _INDEX_SUFFIX))]
    changes |= {name: Change.REMOVE for name in sorted(stale) if "/" not in name}
    # And what says something about contents that are no longer there.
    changes |= {
        name: Change.REMOVE for name in ABOUT_FILES if name in remote and name not in files
    }
    there = sorted(path.name for path in folder.iterdir())
    left_out = tuple(name for name in there if name not in files and name != ".cache")
    return PublishPlan(files, changes, left_out)


def differences(plan: PublishPlan, remote: Mapping[str, RemoteFile]) -> list[str]:
    """Return the names of the files that a listing does not have as planned."""
    wrong = [name for name, file in plan.files.items() if not file.is_same(remote.get(name))]
    return [*wrong, *(name for name in plan.remove if name in remote)]


def foreign_changes(
    plan: PublishPlan, before: Mapping[str, RemoteFile], after: Mapping[str, RemoteFile]
) -> list[str]:
    """Return the names of the files that differ between two listings and are not of the plan."""
    names = sorted({*before, *after}.difference(plan.files, plan.remove))
    return [name for name in names if before.get(name) != after.get(name)]


def _git_sha1(folder: Path, file: HashedFile, text: str | None) -> str | None:
    """Return git's hash of a small file, which the Hub lists for files outside of LFS."""
    if file.name.endswith(SHARD_SUFFIX):
        return None
    digest = hashlib.sha1(f"blob {file.nbytes}\0".encode(), usedforsecurity=False)
    if text is not None:
        digest.update(text.encode())
        return digest.hexdigest()
    with (folder / file.name).open("rb") as opened:
        while piece := opened.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
