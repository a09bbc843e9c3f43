"""Repositories of the test Hub: commits, branches, tags, pull requests, and blobs on disk."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

# What the Hub itself keeps in LFS, by .gitattributes; larger files go there too.
LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".onnx", ".model")
LFS_FROM_BYTES = 10_000_000


@dataclass(frozen=True)
class Entry:
    """One file of a commit."""

    size: int
    oid: str  # git SHA-1 of the content, or of the LFS pointer
    sha256: str | None = None  # of LFS files
    xet: str | None = None

    @property
    def blob(self) -> str:
        return self.sha256 or self.oid

    def to_json(self, path: str) -> dict:
        document = {"type": "file", "path": path, "size": self.size, "oid": self.oid}
        if self.sha256:
            document["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": 134}
        if self.xet:
            document["xetHash"] = self.xet
        return document


@dataclass(frozen=True)
class Commit:
    """A state of the whole repository."""

    sha: str
    tree: dict[str, Entry]
    parent: str | None
    title: str


@dataclass
class PullRequest:
    """A proposed change; its commits are under refs/pr/<num>."""

    num: int
    title: str
    author: str
    base: str  # main, when it was opened
    status: str = "open"


@dataclass
class Repository:
    """One model repository."""

    store: Store
    name: str
    private: bool = False
    gated: bool = False
    granted: set[str] = field(default_factory=set)  # users who may read a gated one
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: list[PullRequest] = field(default_factory=list)
    commits: dict[str, Commit] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.branches["main"] = self._add(Commit(_sha1(self.name), {}, None, "initial commit"))

    @property
    def head(self) -> str:
        return self.branches["main"]

    def resolve(self, revision: str) -> str | None:
        refs = {**self.tags, **self.branches}
        sha = refs.get(revision, revision)
        return sha if sha in self.commits else None

    def tree(self, revision: str = "main") -> dict[str, Entry]:
        sha = self.resolve(revision)
        assert sha is not None, revision
        return self.commits[sha].tree

    def read(self, path: str, revision: str = "main") -> bytes:
        return self.store.path(self.tree(revision)[path].blob).read_bytes()

    def commit(self, branch: str, tree: dict[str, Entry], title: str) -> str:
        parent = self.branches[branch]
        text = json.dumps([parent, len(self.commits), title, sorted(tree)])
        self.branches[branch] = self._add(Commit(_sha1(text), tree, parent, title))
        return self.branches[branch]

    def seed(self, source: Path | dict[str, bytes], branch: str = "main") -> str:
        """Commit the files of a folder, or files given by name; return the commit."""
        files = source if isinstance(source, dict) else _files(source)
        tree = self.tree(branch) | {
            path: self.store.entry(path, content) for path, content in files.items()
        }
        return self.commit(branch, tree, "seeded")

    def merge(self, pull: PullRequest) -> None:
        """Bring what a pull request changes into main."""
        before, after = self.tree(pull.base), self.tree(f"refs/pr/{pull.num}")
        removed = before.keys() - after.keys()
        changed = {path: entry for path, entry in after.items() if before.get(path) != entry}
        tree = {path: e for path, e in self.tree().items() if path not in removed} | changed
        self.commit("main", tree, f"{pull.title} (#{pull.num})")
        pull.status = "merged"

    def _add(self, commit: Commit) -> str:
        self.commits[commit.sha] = commit
        return commit.sha


class Store:
    """All repositories and blobs; `lock` is held by whoever changes them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = threading.RLock()
        self.repositories: dict[str, Repository] = {}
        self.users: dict[str, str] = {}  # token -> user
        (folder / "blobs").mkdir(parents=True, exist_ok=True)

    def create(self, name: str, *, private: bool = False, gated: bool = False) -> Repository:
        self.repositories[name] = Repository(self, name, private=private, gated=gated)
        return self.repositories[name]

    def clear(self) -> None:
        self.repositories.clear()
        for blob in (self.folder / "blobs").iterdir():
            blob.unlink()

    def path(self, blob: str) -> Path:
        return self.folder / "blobs" / blob

    def entry(self, path: str, content: bytes | Path) -> Entry:
        """Store a file's content as the Hub would, in LFS or not."""
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        if path.endswith(LFS_SUFFIXES) or size >= LFS_FROM_BYTES:
            digest = _sha256(content)
            self._keep(digest, content)
            return lfs_entry(digest, size)
        data = content.read_bytes() if isinstance(content, Path) else content
        oid = git_sha1(data)
        self._keep(oid, data)
        return Entry(size, oid)

    def _keep(self, blob: str, content: bytes | Path) -> None:
        if isinstance(content, Path):
            shutil.copyfile(content, self.path(blob))
        else:
            self.path(blob).write_bytes(content)


def lfs_entry(sha256: str, size: int, xet: str | None = None) -> Entry:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    return Entry(size, git_sha1(pointer.encode()), sha256, xet)


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _files(folder: Path) -> dict[str, Path]:
    paths: Iterable[Path] = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in paths}


def _sha1(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


def _sha256(content: bytes | Path) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
