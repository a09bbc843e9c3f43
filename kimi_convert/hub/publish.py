"""Publish a checkpoint so that nobody ever sees half of it.

    check the folder -> hash it -> card and SHA256SUMS -> compare with the repository
    -> upload contents (seen by nobody yet) -> one commit, as a pull request or on a branch
    -> the listing must have every hash -> merge -> tag

A run that ends anywhere can be given again: contents that are there are not sent again, and an
open pull request of the same contents is taken up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from kimi_convert.checkpoints.manifest import (
    HashedFile,
    content_files,
    hash_files,
)
from kimi_convert.config.huggingface import read_config
from kimi_convert.config.progress import ProgressCallback, ignore_progress
from kimi_convert.errors import OutputError, UsageError, VerificationError
from kimi_convert.hub.completion import completed
from kimi_convert.hub.publication import Publication, State
from kimi_convert.hub.publish_plan import PublishPlan, plan_publication
from kimi_convert.hub.reference import DEFAULT_REVISION, Reference, parse_reference
from kimi_convert.hub.remote import connect
from kimi_convert.validation.record import Record, read_record


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishOptions:
    """Where a folder goes and how."""

    private: bool = False  # of a repository that is made for it
    branch: str = DEFAULT_REVISION
    pull_request: bool = False  # leave it open for somebody to review
    tag: str | None = None
    force: bool = False  # also what no validation covers
    sign_key: Path | None = None  # PEM of the private key to sign with

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        if self.pull_request and self.branch != DEFAULT_REVISION:
            raise UsageError("--pull-request goes to main: it cannot have a --branch")
        if self.pull_request and self.tag:
            raise UsageError(
                "--tag marks what is published, and a pull request is not yet",
                hint="Tag it when it has been merged.",
            )
        for name in (self.branch, self.tag):
            if name is not None:
                parse_reference("a/b", revision=name)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishResult:
    """What was published, or with a dry run would be."""

    repository: str
    branch: str
    plan: PublishPlan
    validated: bool
    dry_run: bool
    commit: str | None = None  # where it can be seen; None in a dry run
    pull_request: int | None = None
    merged: bool = False
    tag: str | None = None

    def to_json(self) -> dict[str, object]:
        """Return the document that `publish --json` prints."""
        return {
            "repository": self.repository,
            "branch": self.branch,
            "commit": self.commit,
            "pull_request": self.pull_request,
            "merged": self.merged,
            "tag": self.tag,
            "dry_run": self.dry_run,
            "validated": self.validated,
            "files": [
                {
                    "name": file.name,
                    "size": file.nbytes,
                    "sha256": file.sha256,
                    "change": str(self.plan.changes[file.name]),
                }
                for file in self.plan.files.values()
            ],
            "removed": list(self.plan.remove),
            "left_out": list(self.plan.left_out),
        }


def ignore_plan(plan: PublishPlan) -> None:
    """Take a plan and do nothing: the default callback."""


_DEFAULTS = PublishOptions()


def publish_checkpoint(
    folder: str | Path,
    repository: str,
    *,
    options: PublishOptions = _DEFAULTS,
    dry_run: bool = False,
    on_plan: Callable[[PublishPlan], None] = ignore_plan,
    on_progress: ProgressCallback = ignore_progress,
) -> PublishResult:
    """Put a checkpoint folder on the Hub: whole, checked there, and only then to be seen.

    The folder gets a card, README.md, unless it has one of its own, SHA256SUMS, and a signature if
    there is a key.

    Args:
        folder: a checkpoint; what lies in it beside one stays here.
        repository: `org/name`; made if there is none.
        options: where it goes and how.
        dry_run: only say what would be done; nothing is written, here or there.
        on_plan: told what will be done, before anything is sent.
        on_progress: told of bytes hashed and uploaded.

    Raises:
        UsageError: the options contradict each other, or not the name of a repository.
        VerificationError: the folder was not validated as it is, or did not pass; or what the
            repository lists in the end is not what was sent. main is as it was.
        ConfigError, CheckpointError: the folder is not one whole checkpoint.
        OutputError: the repository, or a tag in it, is not as asked for.
        HubError: no network, no login, or no right to write.
    """
    folder, reference = Path(folder), parse_reference(repository)
    if reference.revision != DEFAULT_REVISION:
        raise UsageError("a revision cannot be published to", hint="Give --branch instead.")
    read_config(folder)
    names = content_files(folder)
    publication = Publication(connect(), reference.repository, options.branch)
    publication.check_login()
    state = publication.look()
    _check_private(reference, options, state)
    content = hash_files(folder, names, on_progress=on_progress)
    record = _record(folder, content, force=options.force)
    hashed, texts = completed(
        folder, reference.repository, content, record, key=options.sign_key, write=not dry_run
    )
    if state is None and not dry_run:
        state = publication.create(private=options.private)
    plan = plan_publication(folder, hashed, state.files if state else {}, texts=texts)
    result = PublishResult(
        repository=reference.repository,
        branch=options.branch,
        plan=plan,
        validated=record is not None,
        dry_run=dry_run,
    )
    if dry_run or state is None:
        return result
    on_plan(plan)
    publication.check_tag(options.tag, plan, state)
    merge = not options.pull_request
    done = publication.run(folder, plan, state, merge=merge, on_progress=on_progress)
    if options.tag:
        publication.tag(options.tag, done.commit)
    return replace(
        result,
        commit=done.commit,
        pull_request=done.pull_request,
        merged=done.merged,
        tag=options.tag,
    )


def _check_private(reference: Reference, options: PublishOptions, state: State | None) -> None:
    """Refuse to show to everybody what was meant for a few.

    Raises:
        OutputError: a private repository was asked for, and there is a public one.
    """
    if state is not None and options.private and not state.is_private:
        raise OutputError(
            "repository is there already, and public",
            where=reference.repository,
            expected="a private one, or none",
            hint="Make it private on its page, choose another name, or leave out --private.",
        )


def _record(folder: Path, content: dict[str, HashedFile], *, force: bool) -> Record | None:
    """Return the record of a validation that passed on these very bytes.

    Raises:
        VerificationError: there is none.
    """
    record = read_record(folder)
    if record is not None and record.passed and record.covers(content):
        return record
    if force:
        return None
    if record is None:
        found = "no validation.json"
    elif not record.passed:
        found = "a validation that failed"
    else:
        found = "a validation of other files"
    raise VerificationError(
        "folder is not validated as it is",
        where=folder,
        expected="validation.json of a validation that passed on these files",
        found=found,
        hint="Run `kimi-convert validate FOLDER --record`, or publish it with --force all the same.",
    )
