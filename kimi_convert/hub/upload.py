"""Contents of files to the Hub, where nobody sees them until a commit names them.

How they travel, in LFS or by xet, in parts or not at all because they are there, is
huggingface_hub's. What was sent is held against what was hashed before.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.utils import disable_progress_bars

from kimi_convert.checkpoints.messages import quoted
from kimi_convert.config.progress import ProgressCallback, ProgressEvent
from kimi_convert.config.secrets import without_secrets
from kimi_convert.errors import HubError, VerificationError
from kimi_convert.hub.failures import NETWORK_ERRORS, call
from kimi_convert.hub.publish_plan import LocalFile, PublishPlan
from kimi_convert.hub.remote import Remote

_STAGE = "uploading"


def upload_contents(
    remote: Remote,
    repository: str,
    folder: Path,
    plan: PublishPlan,
    *,
    branch: str | None,
    on_progress: ProgressCallback,
) -> list[CommitOperationAdd]:
    """Send what the plan says, the smallest first; return what a commit is made of.

    Args:
        remote: the Hub.
        repository: `org/name`, which exists.
        folder: where the files lie.
        plan: which of them are sent.
        branch: where they will go; None for a pull request, for which reading rights are enough.
        on_progress: told of bytes, after each file.

    Raises:
        HubError: they cannot be sent.
        VerificationError: a file is another than when it was hashed.
    """
    files = sorted(plan.upload, key=lambda file: file.nbytes)
    total, done = sum(file.nbytes for file in files), 0
    api = remote.api
    additions: list[CommitOperationAdd] = []
    with disable_progress_bars():
        for file in files:
            on_progress(ProgressEvent(_STAGE, done, total, "bytes", file.name))
            addition = CommitOperationAdd(file.name, folder / file.name)
            call(
                lambda added=addition: _send(api, repository, added, branch),
                what=f"{repository}: {file.name}",
                policy=remote.policy,
            )
            _check_unchanged(addition, file, folder)
            additions.append(addition)
            done += file.nbytes
    on_progress(ProgressEvent(_STAGE, done, total, "bytes"))
    return additions


def _send(api: HfApi, repository: str, addition: CommitOperationAdd, branch: str | None) -> None:
    try:
        api.preupload_lfs_files(
            repository,
            [addition],
            revision=branch,
            create_pr=branch is None,
            free_memory=False,
        )
    except RuntimeError as error:
        # Uploads to LFS wrap what happened; those by xet are told in words alone.
        if isinstance(error.__cause__, NETWORK_ERRORS):
            raise error.__cause__ from error
        raise HubError(
            "the upload breaks off",
            where=f"{repository}: {addition.path_in_repo}",
            found=quoted(without_secrets(str(error), also=get_token())),
            hint="Run again: what has been sent is not sent again.",
        ) from error


def _check_unchanged(addition: CommitOperationAdd, file: LocalFile, folder: Path) -> None:
    """Check that what was sent is what was hashed, and planned, before."""
    sent = addition.upload_info.sha256.hex()
    if sent != file.sha256:
        raise VerificationError(
            "file changed while it was in use",
            where=folder / file.name,
            expected=f"SHA-256 {file.sha256}",
            found=f"SHA-256 {sent}",
            hint="Wait until nothing writes to the folder, then run again.",
        )
