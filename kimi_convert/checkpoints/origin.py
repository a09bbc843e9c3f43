"""Where a checkpoint folder was downloaded from, told from the folder itself.

A snapshot in the Hub's cache has repository and commit in its path; a folder that `download` has
filled has them in a file. What its card declares as licence is read too: one line, no YAML.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import cast

# Written by `download --local-dir`, where uploads by huggingface_hub leave it out.
ORIGIN_FILE = ".cache/huggingface/kimi-convert/origin.json"

_CARD_FILE = "README.md"
_MAX_CARD_BYTES = 1 << 20
_REPOSITORY = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FRONT = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?$", re.DOTALL | re.MULTILINE)
_LICENSE = re.compile(
    r"^license: *[\"']?([A-Za-z0-9][A-Za-z0-9.+-]{0,60})[\"']? *\r?$", re.MULTILINE
)


@dataclass(frozen=True, slots=True)
class Origin:
    """A repository on the Hub and a commit of it."""

    repository: str  # "org/name"
    commit: str


def read_origin(folder: Path) -> Origin | None:
    """Return where the folder came from, or None if it does not say."""
    folder = folder.resolve()
    recorded = _recorded(folder / ORIGIN_FILE)
    if recorded is not None:
        return recorded
    snapshots, storage = folder.parent, folder.parent.parent
    parts = storage.name.split("--")
    if snapshots.name != "snapshots" or len(parts) != 3 or parts[0] != "models":
        return None
    return _checked(f"{parts[1]}/{parts[2]}", folder.name)


def declared_license(folder: Path) -> str | None:
    """Return the licence that the folder's card declares in its first lines, or None."""
    try:
        with (folder / _CARD_FILE).open("rb") as file:
            text = file.read(_MAX_CARD_BYTES).decode("utf-8", "replace")
    except OSError:
        return None
    front = _FRONT.match(text)
    found = _LICENSE.search(front[1]) if front else None
    return found[1].lower() if found else None


def _recorded(path: Path) -> Origin | None:
    try:
        document: object = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    fields = cast("dict[str, object]", document) if isinstance(document, dict) else {}
    return _checked(fields.get("repository"), fields.get("commit"))


def _checked(repository: object, commit: object) -> Origin | None:
    if (
        isinstance(repository, str)
        and isinstance(commit, str)
        and _REPOSITORY.fullmatch(repository)
        and _COMMIT.fullmatch(commit)
    ):
        return Origin(repository, commit)
    return None
