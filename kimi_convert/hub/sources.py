"""A source argument as a folder: one that is here, or `org/name` on the Hub made into one.

What only looks at headers gets them by range, without the weights. What reads tensors gets the
whole checkpoint in the Hub's cache, fetched or found there.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kimi_convert.config.progress import ProgressCallback, ignore_progress
from kimi_convert.errors import HubError, KimiConvertError
from kimi_convert.hub.reference import Reference, reference_of


@dataclass(frozen=True, slots=True)
class Source:
    """A folder to read, and what to call it."""

    folder: Path
    name: Path  # the folder itself, or "org/name@commit"

    def named(self, error: KimiConvertError) -> KimiConvertError:
        """Return an error with the name in place of a temporary folder."""
        error.where = error.where.replace(str(self.folder), str(self.name))
        return error


@contextmanager
def open_headers(source: str | Path) -> Generator[Source]:
    """Give a folder whose configuration, index and headers can be read, and nothing else.

    Args:
        source: a folder, or `org/name[@revision]`.

    Raises:
        HubError: it cannot be fetched.
        CheckpointError: what the repository holds is not a checkpoint.
        ResourceError: the temporary folder cannot be written.
    """
    reference = reference_of(source)
    if reference is None:
        yield Source(Path(source), Path(source))
        return
    from huggingface_hub import is_offline_mode

    from kimi_convert.hub.headers import folder_of_headers
    from kimi_convert.hub.remote import connect

    if is_offline_mode():
        folder = fetch_source(source)
        yield Source(folder, folder)
        return
    with _folder_was_meant(reference):
        remote = connect()
        snapshot = remote.pin(reference)
    with folder_of_headers(remote, snapshot) as folder:
        opened = Source(folder, Path(snapshot.name))
        try:
            yield opened
        except KimiConvertError as error:
            opened.named(error)
            raise


def fetch_source(source: str | Path, *, on_progress: ProgressCallback = ignore_progress) -> Path:
    """Return a folder with the whole checkpoint, downloaded if need be.

    Args:
        source: a folder, or `org/name[@revision]`.
        on_progress: told of the bytes of a download.

    Raises:
        HubError, CheckpointError, ResourceError, VerificationError: see `download_checkpoint`.
    """
    reference = reference_of(source)
    if reference is None:
        return Path(source)
    from kimi_convert.hub.download import download_checkpoint

    with _folder_was_meant(reference):
        return download_checkpoint(reference, on_progress=on_progress).folder


@contextmanager
def _folder_was_meant(reference: Reference) -> Generator[None]:
    """Say, where a repository is not found, that there is no such folder either."""
    try:
        yield
    except HubError as error:
        error.hint = f"{error.hint} If a folder was meant: there is none at {reference}.".strip()
        raise
