"""Download a checkpoint: pinned, checked before and after, and resumable.

    pin the revision to a commit -> read and check the index -> choose files -> room on the disk
    -> fetch in parallel -> every hash right -> the index appears last

What is there already is used, whoever fetched it, once its hash has been checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import is_offline_mode

from kimi_convert.config.huggingface import CONFIG_FILE
from kimi_convert.config.progress import ProgressCallback, ignore_progress
from kimi_convert.errors import UsageError
from kimi_convert.hub.fetch_job import FetchedFile, Job, SmallFiles
from kimi_convert.hub.offline import recorded_snapshot
from kimi_convert.hub.places import CachePlace, FolderPlace, cache_folder
from kimi_convert.hub.reference import Reference, parse_reference
from kimi_convert.hub.remote import connect
from kimi_convert.hub.selection import select
from kimi_convert.hub.transfer import Transfer

DEFAULT_MAX_WORKERS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadResult:
    """What a download fetched, or with a dry run would fetch."""

    reference: Reference
    commit: str
    folder: Path
    files: tuple[FetchedFile, ...]
    left_out: tuple[tuple[str, str], ...]
    dry_run: bool

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files)

    @property
    def fetched_bytes(self) -> int:
        """Bytes of the files that were not there."""
        return sum(file.nbytes for file in self.files if not file.was_there)

    def to_json(self) -> dict[str, object]:
        """Return the document that `download --json` prints."""
        return {
            "repository": self.reference.repository,
            "revision": self.reference.revision,
            "commit": self.commit,
            "folder": str(self.folder),
            "dry_run": self.dry_run,
            "nbytes": self.nbytes,
            "fetched_bytes": self.fetched_bytes,
            "files": [file.to_json() for file in self.files],
            "left_out": [{"name": path, "why": why} for path, why in self.left_out],
        }


def download_checkpoint(
    repository: str | Reference,
    *,
    revision: str | None = None,
    local_dir: str | Path | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_workers: int = DEFAULT_MAX_WORKERS,
    dry_run: bool = False,
    on_progress: ProgressCallback = ignore_progress,
) -> DownloadResult:
    """Fetch a checkpoint from the Hub; what is there is not fetched again.

    Args:
        repository: `org/name` or `org/name@revision`.
        revision: branch, tag or commit; main if neither names one.
        local_dir: a folder for the files; None for the Hub's cache, which programs share.
        include: patterns of paths to fetch instead of the default, which is weights in
            safetensors format, configuration, tokenizer and terms.
        exclude: patterns of paths not to fetch.
        max_workers: how many files are fetched at a time.
        dry_run: only say what would be fetched.
        on_progress: told of bytes, over all and of each file.

    Raises:
        UsageError: not the name of a repository.
        HubError: no network, no such repository or revision, or no right to read it.
        CheckpointError: what the repository holds is not a checkpoint, or not safe.
        ResourceError: too little disk space; nothing is fetched then.
        VerificationError: a file did not come as the repository lists it.
        OutputError: a file of the folder is in the way.
    """
    if max_workers < 1:
        raise UsageError("--max-workers must be at least 1", found=max_workers)
    if isinstance(repository, Reference):
        reference = repository
    else:
        reference = parse_reference(repository, revision=revision)
    folder = None if local_dir is None else Path(local_dir)
    remote = connect()
    offline = is_offline_mode()
    snapshot = recorded_snapshot(reference, folder) if offline else remote.pin(reference)
    place = CachePlace(cache_folder(), snapshot) if folder is None else FolderPlace(folder)
    transfer = Transfer(remote, snapshot)
    small = SmallFiles(transfer, place)
    selection = select(snapshot, small.read, include=include, exclude=exclude)
    job = Job(transfer, place, selection, small.known, on_progress)
    if not dry_run:
        job.require_space()
        job.fetch(max_workers)
        if any(file.path == CONFIG_FILE for file in selection.files):
            place.note_origin(snapshot)  # else it may still hold a checkpoint of another commit
    return DownloadResult(
        reference=reference,
        commit=snapshot.commit,
        folder=place.folder,
        files=job.files(),
        left_out=selection.left_out,
        dry_run=dry_run,
    )
