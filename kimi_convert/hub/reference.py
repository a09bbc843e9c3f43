"""Names of checkpoints on the Hub, as people write them: `org/name`, `org/name@revision`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from kimi_convert.checkpoints.messages import quoted
from kimi_convert.errors import UsageError

DEFAULT_REVISION = "main"

# What the Hub allows: no part starts or ends with a dot or a dash, "--" and ".." do not occur.
_PART = r"(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_NAME = re.compile(rf"({_PART})/({_PART})")
# A branch, tag, commit or refs/pr/<number>; git forbids the rest.
_REVISION = re.compile(r"(?!.*(?:\.\.|//|@\{))[A-Za-z0-9_](?:[\w./+-]{0,254}[\w+-])?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Reference:
    """A model repository and the revision that is meant."""

    repository: str  # "org/name"
    revision: str = DEFAULT_REVISION  # branch, tag or commit

    def __str__(self) -> str:
        """Return it as it is written on the command line."""
        if self.revision == DEFAULT_REVISION:
            return self.repository
        return f"{self.repository}@{self.revision}"


def parse_reference(text: str, *, revision: str | None = None) -> Reference:
    """Return the repository and revision that a text names.

    Args:
        text: `org/name` or `org/name@revision`.
        revision: the same as what stands behind the "@", given apart.

    Raises:
        UsageError: the text is not such a name, or gives a second revision.
    """
    name, at, behind = text.partition("@")
    if at and revision is not None and revision != behind:
        raise UsageError(
            "two revisions are given",
            found=f"{quoted(behind)} and {quoted(revision)}",
            hint="Give one of them.",
        )
    wanted = behind if at else revision or DEFAULT_REVISION
    if not _NAME.fullmatch(name):
        raise UsageError(
            "not the name of a repository",
            expected="org/name or org/name@revision",
            found=quoted(text),
        )
    if not _REVISION.fullmatch(wanted):
        raise UsageError(
            "not a revision",
            where=name,
            expected="a branch, a tag or a commit",
            found=quoted(wanted),
        )
    return Reference(name, wanted)


def reference_of(source: str | Path) -> Reference | None:
    """Return the reference that a source argument is, or None if it is a folder.

    A folder that exists is that folder, whatever its name. Else what looks like `org/name` is
    one on the Hub; "./org/name" is always a folder.
    """
    text = str(source)
    if Path(source).exists() or not _NAME.fullmatch(text.partition("@")[0]):
        return None
    return parse_reference(text)


def is_commit(revision: str) -> bool:
    """Tell whether a revision is the full hash of a commit, which never moves."""
    return _COMMIT.fullmatch(revision) is not None
